import json
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import llama
from interrupted import KilledError, kill_at
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import bonetune
from bonetune.errors import InputError, RunError, SpecError
from bonetune.models import end_tokens, load_model
from bonetune.spec import VARIANTS
from bonetune.training import folder, plan, preflight

WORDS = ["the", "quick", "brown", "fox", "lazy", "dog"]


@pytest.fixture
def settings(tmp_path, model_folder):
    rows = [{"prompt": f"after {a} {b} comes", "completion": f" {b}"} for a in WORDS for b in WORDS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model_name_or_path": str(model_folder),
        "dataset_name": str(tmp_path / "rows.jsonl"),
        "output_dir": str(tmp_path / "run"),
        "r": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "max_steps": 6,
        "sample_prompts": 0,
    }


@pytest.mark.filterwarnings("ignore:.*LoRA's size.*")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_learns_and_leaves_an_adapter_behind(settings, tmp_path, variant):
    seen = []
    settings |= {"variant": variant, "learning_rate": 1e-2, "max_steps": 12, "eval_dataset_name": settings["dataset_name"]}
    result = bonetune.train(settings, on_progress=seen.append)
    run = tmp_path / "run"
    assert result.last_loss < result.first_loss
    assert result.steps == 12 == seen[-1].step == seen[-1].steps
    assert seen[-1].seconds_left == 0
    assert seen[-1].tokens_per_second > 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert any("eval_loss" in line for line in lines)
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len((run / "prompts.jsonl").read_text().splitlines()) == 16
    assert not list(tmp_path.glob(".*"))
    model = PeftModel.from_pretrained(llama(), run)
    assert model.peft_config["default"].variant == variant
    assert model.peft_config["default"].base_model_name_or_path == settings["model_name_or_path"]


def test_one_seed_one_result(settings, tmp_path):
    adapters = []
    for name in ("a", "b", "c"):
        bonetune.train(settings, {"output_dir": str(tmp_path / name), "seed": 1 if name == "c" else 0})
        adapters.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    assert all(torch.equal(adapters[0][k], adapters[1][k]) for k in adapters[0])
    assert any(not torch.equal(adapters[0][k], adapters[2][k]) for k in adapters[0])


def test_gradient_accumulation_is_a_larger_batch(settings, tmp_path):
    adapters = []
    for name, batch, steps in (("whole", 4, 1), ("parts", 2, 2)):
        overrides = {
            "output_dir": str(tmp_path / name),
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": steps,
        }
        bonetune.train(settings, overrides)
        adapters.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    for key in adapters[0]:
        torch.testing.assert_close(adapters[0][key], adapters[1][key], rtol=1e-3, atol=1e-5)


def test_resuming_goes_on_where_the_run_stopped(settings, tmp_path):
    bonetune.train(settings)
    whole = load_file(tmp_path / "run" / "adapter_model.safetensors")
    interrupted = settings | {"output_dir": str(tmp_path / "again"), "save_steps": 2}
    with pytest.raises(KilledError):
        bonetune.train(interrupted, on_progress=kill_at(5))
    assert not (tmp_path / "again" / "adapter_model.safetensors").exists()
    bonetune.train(interrupted, resume=True)
    resumed = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    runs = [
        [{k: v for k, v in json.loads(line).items() if k in ("step", "loss")} for line in path.read_text().splitlines()]
        for path in (tmp_path / "run" / "metrics.jsonl", tmp_path / "again" / "metrics.jsonl")
    ]
    assert runs[0] == runs[1]


def test_an_output_folder_with_a_run_in_it(settings, tmp_path):
    bonetune.train(settings)
    with pytest.raises(InputError, match="already holds a run: pass --overwrite or --resume"):
        bonetune.train(settings)
    bonetune.train(settings, {"max_steps": 2}, overwrite=True)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    with pytest.raises(InputError, match="holds no checkpoint to resume from"):
        bonetune.train(settings, {"output_dir": str(tmp_path / "new")}, resume=True)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"dataset_name": "missing.jsonl"}, InputError, r"missing\.jsonl does not exist"),
        ({"max_length": 4}, InputError, "36 of 36 examples are longer than max_length=4"),
        ({"variant": "bat", "r": 5}, SpecError, "r=4 would fit them all"),
        ({"target_modules": ["query"]}, ValueError, "The model has Linear layers named"),
        ({"model_name_or_path": "./nowhere"}, InputError, r"Model folder \./nowhere does not exist"),
        ({"dataset_field": ["query", "response"]}, InputError, "Row 1 has no field 'query'"),
    ],
)
def test_a_run_that_cannot_be_writes_nothing(settings, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        bonetune.train(settings | changes)
    assert not (tmp_path / "run").exists()


def test_a_lora_sized_learning_rate_is_remarked_on(settings):
    with pytest.warns(UserWarning, match="is of LoRA's size"):
        planned = plan(settings | {"learning_rate": 2e-2})
    assert len(planned.notes) == 1
    assert plan(settings | {"learning_rate": None}).notes == []


def test_a_dtype_that_the_cpu_cannot_multiply_is_remarked_on(settings, monkeypatch):
    """Without AVX512 a step of SmolLM2-135M took 240 s in bfloat16, and 11 s in float32."""
    monkeypatch.setattr(preflight, "lacks_instructions_for", lambda dtype: dtype == torch.bfloat16)
    assert "set dtype to float32" in plan(settings | {"dtype": "bfloat16"}).notes[0]
    assert "leave bf16 out" in plan(settings | {"bf16": True}).notes[0]
    assert plan(settings).notes == []


def test_a_plan_counts_what_it_will_do(settings):
    planned = plan({**settings, "max_steps": None, "num_train_epochs": 2})
    assert planned.steps == 18
    assert f"{planned.trainable_parameters:,} trainable parameters" in planned.describe()
    assert "36 examples" in planned.describe()
    assert "18 steps" in planned.describe()


def test_a_run_that_falls_apart_stops_with_an_error(settings, tmp_path):
    with (
        pytest.warns(UserWarning, match="LoRA's size"),
        pytest.raises(RunError, match=r"The loss is .* at step \d+.*Lower learning_rate"),
    ):
        bonetune.train(settings | {"learning_rate": 1e20})
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_a_failed_overwrite_leaves_the_old_run(settings, tmp_path):
    bonetune.train(settings)
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file()}
    for change in ({"optim": "adamw_tpyo"}, {"target_modules": ["query"]}, {"max_length": 3}):
        with pytest.raises(ValueError, match=r"adamw_torch|Linear layers named|longer than"):
            bonetune.train(settings | change, overwrite=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file()} == before


def test_a_finished_run_is_not_trained_further(settings, tmp_path):
    bonetune.train(settings)
    weights = (tmp_path / "run" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(InputError, match="has done its 6 steps: raise max_steps"):
        bonetune.train(settings, resume=True)
    assert (tmp_path / "run" / "adapter_model.safetensors").read_bytes() == weights
    assert bonetune.train(settings, {"max_steps": 7}, resume=True).steps == 7


@pytest.mark.parametrize("change", [{"variant": "bat-left"}, {"r": 8}, {"seed": 5}, {"learning_rate": 1e-4}])
def test_a_run_is_resumed_as_what_it_was(settings, tmp_path, change):
    settings |= {"variant": "bat", "save_steps": 2}
    bonetune.train(settings)
    name, value = next(iter(change.items()))
    with pytest.raises(InputError, match=f"started with other settings: {name} .*now {value!r}"):
        bonetune.train(settings | {"max_steps": 8} | change, resume=True)
    assert f"{name}: {value}" not in (tmp_path / "run" / "run.yaml").read_text()


def test_resuming_passes_over_what_is_no_whole_checkpoint(settings, tmp_path):
    bonetune.train(settings | {"save_steps": 3})
    run = tmp_path / "run"
    (run / "checkpoint-best").mkdir()
    (run / "checkpoint-6" / "optimizer.pt").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    with pytest.warns(UserWarning, match=r"checkpoint-6 lacks optimizer\.pt: passed over"):
        assert bonetune.train(settings, {"max_steps": 7, "save_steps": 3}, resume=True).steps == 7
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 8))


@pytest.mark.parametrize(("batch", "accumulation", "epochs"), [(4, 1, 1), (5, 3, 2), (1, 5, 0.5), (8, 2, 1.5), (64, 4, 1)])
def test_a_plan_counts_steps_as_the_trainer_does(settings, batch, accumulation, epochs):
    settings |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    settings |= {"num_train_epochs": epochs, "max_steps": None}
    assert plan(settings).steps == bonetune.train(settings).steps


def test_evaluation_while_training_is_that_of_bonetune_eval(settings, tmp_path):
    rows = [{"prompt": "a", "completion": " b" * n} for n in (1, 2, 3, 9, 17)]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = {"eval_dataset_name": str(tmp_path / "held.jsonl"), "eval_steps": 6}
    bonetune.train(settings | held_out | {"per_device_train_batch_size": 2})
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][-1]["eval_loss"]
    (result,) = bonetune.evaluate(str(tmp_path / "run"), ["loss"], data=str(tmp_path / "held.jsonl"))
    assert logged == pytest.approx(result.score, rel=1e-5)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second file system, which Linux has at /dev/shm")
def test_an_output_folder_on_another_file_system(settings, tmp_path):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        (tmp_path / "run").symlink_to(elsewhere)
        bonetune.train(settings)
        assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modules_to_save": ["nonsense"]}, "modules_to_save names modules that the model does not have: nonsense"),
        ({"target_modules": "["}, "is not a regular expression"),
        ({"target_modules": ["q_proj", "norm"]}, "is not supported"),
        ({"output_dir": "{data}/run"}, "is a file"),
    ],
)
def test_more_that_cannot_be(settings, tmp_path, change, message):
    change = {k: v.replace("{data}", settings["dataset_name"]) if isinstance(v, str) else v for k, v in change.items()}
    with pytest.raises(InputError, match=message):
        bonetune.train(settings | change)
    assert not (tmp_path / "run").exists()


def test_resume_and_overwrite_exclude_each_other(settings):
    with pytest.raises(InputError, match="pass one of them"):
        bonetune.train(settings, resume=True, overwrite=True)


class TestGoingOnPastTheEnd:
    """A finished run that is given more steps: what told of its old end must not pass for the new one."""

    def test_what_tells_of_the_old_end_is_gone_while_it_goes_on(self, settings, tmp_path):
        bonetune.train(settings | {"max_steps": 2})
        (tmp_path / "run" / "certificate.json").write_text("{}")
        with pytest.raises(KilledError):
            bonetune.train(settings, {"max_steps": 4}, resume=True, on_progress=kill_at(3))
        left = {path.name for path in (tmp_path / "run").iterdir()}
        assert not left & {"adapter_model.safetensors", "adapter_config.json", "summary.json", "certificate.json", "README.md"}
        assert bonetune.train(settings, {"max_steps": 4}, resume=True).steps == 4

    def test_other_samples(self, settings, tmp_path):
        bonetune.train(settings | {"max_steps": 2, "sample_prompts": 3, "sample_tokens": 2})
        bonetune.train(settings, {"max_steps": 3, "sample_prompts": 1, "sample_tokens": 2}, resume=True)
        (sample,) = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
        assert set(sample) == {"prompt", "expected", "before", "after"}

    def test_the_rate_is_the_longer_schedules_from_the_first_step_on(self, settings, tmp_path):
        settings |= {"lr_scheduler_type": "linear", "warmup_steps": 0}
        bonetune.train(settings | {"max_steps": 4})
        bonetune.train(settings, {"max_steps": 8}, resume=True)
        rates = [json.loads(line)["learning_rate"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        assert rates[4:] == pytest.approx([1e-3 * left / 8 for left in (4, 3, 2, 1)])

    def test_a_closing_that_was_cut_off_is_done_again(self, settings, tmp_path):
        bonetune.train(settings)
        for name in ("summary.json", "README.md", "loss.png"):
            (tmp_path / "run" / name).unlink()
        assert bonetune.train(settings, resume=True).steps == 6
        assert (tmp_path / "run" / "README.md").is_file()


def test_overwriting_takes_the_old_tokenizer_along_and_leaves_other_peoples_files(settings, tmp_path):
    bonetune.train(settings)
    (tmp_path / "run" / "checkpoint-notes.txt").write_text("mine")
    (tmp_path / "run" / "rank0-bad_batch.json").write_text("{}")
    folder.clear(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-notes.txt"]


@pytest.mark.parametrize("more", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 5]}])
def test_whatever_is_trained_is_trained_in_float32(settings, more):
    planned = plan(settings | {"dtype": "bfloat16"} | more)
    assert {p.dtype for p in planned.model.parameters() if p.requires_grad} == {torch.float32}
    assert planned.model.get_base_model().model.norm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_head_trained_whole_learns_in_small_steps(settings, tmp_path, dtype):
    settings |= {"dtype": dtype, "modules_to_save": ["lm_head"], "learning_rate": 1e-6, "max_steps": 3}
    before = AutoModelForCausalLM.from_pretrained(settings["model_name_or_path"]).lm_head.weight
    bonetune.train(settings)
    (after,) = [t for n, t in load_file(tmp_path / "run" / "adapter_model.safetensors").items() if "lm_head" in n]
    assert after.dtype == torch.float32
    moved = (after - before.to(getattr(torch, dtype)).float()).ne(0).float().mean()
    assert moved > 0.9
    assert bonetune.evaluate(str(tmp_path / "run"), ["loss"], data=settings["dataset_name"])[0].score > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fp16": True}, "fp16 needs a GPU"),
        ({"report_to": ["wandb"]}, "report_to wandb needs a package that is not installed: pip install wandb"),
    ],
)
@pytest.mark.skipif(torch.accelerator.is_available(), reason="of a machine without a GPU")
def test_what_this_machine_lacks(settings, change, message):
    with pytest.raises(InputError, match=message):
        plan(settings | change)


def test_the_model_s_own_folder_is_no_output_dir(settings):
    with pytest.raises(InputError, match="output_dir is the model's own folder"):
        plan(settings | {"output_dir": settings["model_name_or_path"]})


def test_a_schedule_that_heeds_evaluations_gets_each_once(settings, tmp_path):
    bonetune.train(settings | {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_size": 4, "max_steps": 16})
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line["step"] for line in lines if "eval_loss" in line]
    assert evaluated == [0, 8, 16]


def test_another_tokenizer_with_another_end_is_learned_and_kept(settings, tmp_path, tokenizer):
    model, own = tmp_path / "model", tmp_path / "tokenizer"
    llama().save_pretrained(model)  # with no tokenizer beside it
    tokenizer.save_pretrained(own)
    with pytest.raises(InputError, match="has no tokenizer that can be loaded"):
        plan(settings | {"model_name_or_path": str(model)})
    told = settings | {"model_name_or_path": str(model), "tokenizer_name_or_path": str(own), "eos_token": "<|im_start|>"}
    assert {e.labels[-1] for e in plan(told).train} == {tokenizer.convert_tokens_to_ids("<|im_start|>")}
    bonetune.train(told)
    loaded = load_model(told["output_dir"])
    assert loaded.tokenizer.eos_token == "<|im_start|>"
    end = loaded.tokenizer.eos_token_id
    assert end in end_tokens(loaded.model, loaded.tokenizer)
    assert bonetune.Chat(loaded).loaded.tokenizer.eos_token_id == end
    (result,) = bonetune.evaluate(loaded, ["loss"], data=settings["dataset_name"], limit=1)
    row = json.loads(Path(settings["dataset_name"]).read_text().splitlines()[0])
    prompt, answer = (tokenizer(row[name]).input_ids for name in ("prompt", "completion"))
    ids = torch.tensor([[*prompt, *answer, end]])
    with torch.no_grad():
        logp = loaded.model(ids).logits.double().log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])
    assert result.score == pytest.approx(-logp[len(prompt) - 1 :].mean().item(), rel=1e-5)


def test_a_tokenizer_of_more_tokens_than_the_model_has_is_refused(settings, tmp_path, tokenizer):
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(InputError, match=r"tokenizer has 321 tokens, and .* has embeddings for 320: choose one"):
        plan(settings | {"tokenizer_name_or_path": str(tmp_path / "tokenizer")})


def test_a_run_on_token_ids_is_the_run_on_their_text(settings, tmp_path, model_folder):
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"{a} after {b}"}) + "\n" for a in WORDS for b in WORDS))
    texts = settings | {"dataset_name": str(tmp_path / "texts.jsonl"), "output_dir": str(tmp_path / "texts")}
    bonetune.tokenize(texts["dataset_name"], str(tmp_path / "ids"), model=str(model_folder))
    ids = settings | {"dataset_name": str(tmp_path / "ids"), "output_dir": str(tmp_path / "out")}
    assert bonetune.train(ids).last_loss == bonetune.train(texts).last_loss
    kept = [load_file(Path(told["output_dir"]) / "adapter_model.safetensors") for told in (ids, texts)]
    assert all(torch.equal(tensor, kept[1][name]) for name, tensor in kept[0].items())
