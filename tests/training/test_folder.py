"""Whom a run's folder belongs to, and what may be different when a run goes on."""

import json
import re
from pathlib import Path

import pytest

import bonetune
from bonetune.errors import InputError
from bonetune.training import checkpoints, plan
from bonetune.training.config import RunConfig, make_config
from bonetune.training.folder import MAY_CHANGE_ON_RESUME, claim, clear

# For each setting, a value that is not the default, and what has to go with it before and after.
OTHERWISE = {
    "model_name_or_path": "other/model",
    "task_type": "SEQ_2_SEQ_LM",
    "dtype": "bfloat16",
    "quantization": "int8",
    "bnb_4bit_use_double_quant": (True, {"quantization": "nf4"}),
    "attn_implementation": "eager",
    "trust_remote_code": True,
    "num_labels": (3, {"task_type": "SEQ_CLS"}),
    "dataset_name": "other.jsonl",
    "dataset_split": "train[:10]",
    "dataset_weights": ([1.0, 2.0], {"dataset_name": ["a.jsonl", "b.jsonl"]}),
    "dataset_format": "text",
    "dataset_field": ["question", "answer"],
    "prompt_template": "Say {instruction}:",
    "completion_only_loss": False,
    "eval_dataset_name": "held.jsonl",
    "eval_dataset_split": "train",
    "eval_size": 5,
    "max_length": 77,
    "truncation": "drop",
    "streaming": (True, {"max_steps": 9}),
    "shuffle_buffer_size": 5,
    "cache_tokens": False,
    "tokenizer_name_or_path": "some/tokenizer",
    "eos_token": "<end>",
    "variant": "bat",
    "r": 8,
    "mini_r": (2, {"variant": "mini"}),
    "target_modules": ["q_proj"],
    "exclude_modules": ["q_proj"],
    "target_parameters": ["experts"],
    "rank_pattern": {"q_proj": 8},
    "bone_dropout": 0.1,
    "exact_update": True,
    "backend": "torch",
    "bias": "all",
    "layers_to_transform": ([1], {"target_modules": ["q_proj"]}),
    "layers_pattern": ("layers", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "modules_to_save": ["lm_head"],
    "trainable_parameters": ["norm.weight"],
    "trainable_token_indices": [1, 2],
    "ensure_weight_tying": True,
    "baseline": "dora",
    "baseline_kwargs": ({"lora_alpha": 8}, {"baseline": "lora"}),
    "train_parts": ["ln"],
    "bptt_length": 7,
    "l2_wrap": 0.1,
    "learning_rate": 1e-5,
    "head_learning_rate": (1e-3, {"task_type": "SEQ_CLS"}),
    "lr_scheduler_type": "linear",
    "lr_scheduler_kwargs": {"num_cycles": 1},
    "warmup_steps": 7,
    "per_device_train_batch_size": 3,
    "per_device_eval_batch_size": 3,
    "gradient_accumulation_steps": 3,
    "num_train_epochs": 7,
    "max_steps": 77,
    "packing": False,
    "group_by_length": False,
    "optim": "sgd",
    "optim_args": "momentum=0.5",
    "weight_decay": 0.1,
    "adam_beta1": 0.5,
    "adam_beta2": 0.5,
    "adam_epsilon": 0.1,
    "max_grad_norm": 0.5,
    "bf16": True,
    "fp16": True,
    "gradient_checkpointing": True,
    "torch_compile": True,
    "seed": 7,
    "logging_steps": 7,
    "eval_steps": (7, {"eval_dataset_name": "held.jsonl"}),
    "save_steps": 7,
    "save_total_limit": 7,
    "rehearsal": False,
    "sample_prompts": 7,
    "sample_tokens": 7,
    "report_to": ["wandb"],
    "run_name": "seven",
    "fsdp": True,
    "fsdp_config": ({"reshard_after_forward": False}, {"fsdp": True}),
    "deepspeed": "zero.json",
}
SETTINGS = {"model_name_or_path": "some/model", "dataset_name": "rows.jsonl"}


def left_by_a_run(folder, settings, step=3):
    """A folder as a killed run leaves it."""
    staged = checkpoints.staging(folder) / f"checkpoint-{step}"
    staged.mkdir(parents=True)
    (staged / "weights").write_text("w")
    place = checkpoints.publish(staged, folder)
    (folder / "run.yaml").write_text(make_config(settings).to_yaml())
    (folder / "metrics.jsonl").write_text("")
    return place


DOCS = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text()
PROMISED = set(re.findall(r"`(\w+)`", DOCS.partition("**What may be different.**")[2].partition("The training data")[0]))


def test_each_setting_is_tried():
    assert set(OTHERWISE) | {"output_dir"} == set(RunConfig.model_fields)


def test_the_documents_say_what_may_be_different():
    assert PROMISED == MAY_CHANGE_ON_RESUME


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_may_be_different_when_a_run_goes_on(tmp_path, name):
    value = OTHERWISE[name]
    value, common = value if isinstance(value, tuple) else (value, {})
    before = SETTINGS | common | {"output_dir": str(tmp_path / "run")}
    place = left_by_a_run(tmp_path / "run", before)
    after = make_config(before | {name: value})
    assert getattr(after, name) != getattr(make_config(before), name)
    if name in PROMISED:
        assert claim(after, resume=True, overwrite=False) == place
    else:
        with pytest.raises(InputError, match=rf"was started with other settings: {name} \(.*, now .*Start a new one"):
            claim(after, resume=True, overwrite=False)


def test_a_run_s_folder_may_have_moved(tmp_path):
    left_by_a_run(tmp_path / "old", SETTINGS | {"output_dir": str(tmp_path / "old")})
    (tmp_path / "old").rename(tmp_path / "new")
    moved = make_config(SETTINGS | {"output_dir": str(tmp_path / "new")})
    assert claim(moved, resume=True, overwrite=False) == tmp_path / "new" / "checkpoint-3"


def test_a_folder_belongs_to_the_run_in_it(tmp_path):
    config = make_config(SETTINGS | {"output_dir": str(tmp_path / "run")})
    assert claim(config, resume=False, overwrite=False) is None
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert claim(config, resume=False, overwrite=False) is None
    with pytest.raises(InputError, match="holds no checkpoint to resume from"):
        claim(config, resume=True, overwrite=False)
    left_by_a_run(tmp_path / "run", SETTINGS | {"output_dir": "run"})
    with pytest.raises(InputError, match="already holds a run: pass --overwrite or --resume"):
        claim(config, resume=False, overwrite=False)
    with pytest.raises(InputError, match="pass one of them"):
        claim(config, resume=True, overwrite=True)
    assert claim(config, resume=False, overwrite=True) is None
    assert (tmp_path / "run" / "checkpoint-3").is_dir()  # until the new run begins


def test_clearing_takes_the_run_and_nothing_else(tmp_path):
    left_by_a_run(tmp_path, SETTINGS | {"output_dir": "run"})
    (checkpoints.staging(tmp_path) / "checkpoint-9").mkdir(parents=True)
    (tmp_path / "adapter_model.safetensors").write_text("a")
    (tmp_path / "bad_batch.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "data").mkdir()
    clear(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "notes.txt"]


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    config = make_config(SETTINGS | {"output_dir": str(tmp_path)})
    older = left_by_a_run(tmp_path, SETTINGS | {"output_dir": "run"}, step=9)
    newer = left_by_a_run(tmp_path, SETTINGS | {"output_dir": "run"}, step=10)
    (newer / "weights").write_text("x")
    with pytest.warns(UserWarning, match="checkpoint-10 has other bytes in weights"):
        assert claim(config, resume=True, overwrite=False) == older
    (older / "weights").unlink()
    with (
        pytest.warns(UserWarning, match="passed over"),
        pytest.raises(InputError, match="holds no whole checkpoint to resume from"),
    ):
        claim(config, resume=True, overwrite=False)


WORDS = ["the", "quick", "brown", "fox", "lazy", "dog", "user", "system"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, model_folder):
    """The settings of a run that is through; nothing below writes to its folder."""
    folder = tmp_path_factory.mktemp("run")
    write_rows(folder / "rows.jsonl", WORDS)
    settings = {
        "model_name_or_path": str(model_folder),
        "dataset_name": str(folder / "rows.jsonl"),
        "output_dir": str(folder / "out"),
        "r": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "save_steps": 2,
        "sample_prompts": 0,
    }
    bonetune.train(settings)
    return settings


def write_rows(file, words):
    rows = [{"prompt": f"after {word} comes", "completion": f" {word}"} for word in words]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def rows(run):
    """The file of the run's rows, as it was again after the test."""
    file = Path(run["dataset_name"])
    before = file.read_text()
    yield file
    file.write_text(before)


@pytest.mark.parametrize("words", [WORDS[::-1], WORDS[:-1], [*WORDS, "one"], [*WORDS[:-1], "one"]])
def test_data_that_has_changed_since(run, rows, words):
    write_rows(rows, words)
    with pytest.raises(InputError, match=r"The training data is not what the run in .* was started with"):
        plan(run, {"max_steps": 9}, resume=True)


def test_data_that_was_written_anew(run, rows):
    write_rows(rows, WORDS)
    assert plan(run, {"max_steps": 9}, resume=True).checkpoint is not None


@pytest.mark.parametrize(("batch", "accumulation", "devices"), [(4, 1, 1), (1, 4, 1), (2, 1, 2), (1, 1, 4)])
def test_a_step_may_be_shared_out_otherwise(run, monkeypatch, batch, accumulation, devices):
    monkeypatch.setenv("WORLD_SIZE", str(devices))
    split = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 9}
    planned = plan(run, split, resume=True)
    assert planned.checkpoint is not None
    assert planned.checkpoint.name == "checkpoint-3"


@pytest.mark.parametrize(("batch", "accumulation", "devices"), [(2, 1, 1), (4, 2, 1), (2, 2, 2)])
def test_a_step_may_not_have_more_examples_or_fewer(run, monkeypatch, batch, accumulation, devices):
    monkeypatch.setenv("WORLD_SIZE", str(devices))
    split = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 9}
    now = batch * accumulation * devices
    with pytest.raises(InputError, match=rf"makes steps of 4 examples, now they would have {now}: .* to the same product"):
        plan(run, split, resume=True)


def test_a_run_that_is_through(run):
    for steps in (1, 3):
        with pytest.raises(InputError, match=rf"has done its {steps} steps: raise max_steps or num_train_epochs"):
            plan(run, {"max_steps": steps}, resume=True)
    assert plan(run, {"max_steps": 4}, resume=True).steps == 4
