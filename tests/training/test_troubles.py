"""What goes wrong in training elsewhere, shown first, and that it does not here: rows of docs/troubles.md."""

import json
import shutil

import pytest
import torch
import usual_tools
from conftest import llama
from processes import start, train_until_the_disk_is_full
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import DataCollatorForSeq2Seq, HfArgumentParser, LlamaModel, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from usual_tools import example, lora, losses, trainer

import bonetune
from bonetune.errors import InputError, RunError
from bonetune.training import checkpoints
from bonetune.training.config import make_config

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
ROWS = [example([3 + 5 * n + k for k in range(6)]) for n in range(16)]
WORDS = ["the", "quick", "brown", "fox", "lazy", "dog", "user", "system"]


@pytest.fixture
def settings(tmp_path, model_folder):
    rows = [{"prompt": f"after {word} comes", "completion": f" {word}" * n} for n, word in enumerate(WORDS, 1)]
    write_rows(tmp_path / "rows.jsonl", rows * 2)
    return {
        "model_name_or_path": str(model_folder),
        "dataset_name": str(tmp_path / "rows.jsonl"),
        "output_dir": str(tmp_path / "run"),
        "r": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "max_steps": 8,
        "packing": False,
        "sample_prompts": 0,
    }


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def metrics(folder):
    """The lines, without what is different each time."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "memory_bytes")} for line in lines]


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def interrupted(whole, folder, step):
    """What a run would have left if it had been killed soon after the checkpoint of `step`."""
    shutil.copytree(whole, folder)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / name).unlink()
    for checkpoint in checkpoints.checkpoints(folder):
        if checkpoints.step_of(checkpoint) > step:
            shutil.rmtree(checkpoint)


def limit_memory(monkeypatch, tokens):
    """A forward of more than `tokens` tokens runs out of memory from now on."""
    forward = LlamaModel.forward

    def limited(model, input_ids=None, **inputs):
        if input_ids.numel() > tokens:
            raise torch.OutOfMemoryError("out of memory")
        return forward(model, input_ids=input_ids, **inputs)

    monkeypatch.setattr(LlamaModel, "forward", limited)


def test_a_resumed_run_reports_other_losses(settings, tmp_path):
    window = {"logging_steps": 4, "save_strategy": "steps", "save_steps": 6, "max_steps": 8}
    usual, resumed = (trainer(tmp_path / name, ROWS, **window) for name in ("usual", "resumed"))
    usual.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "usual" / "checkpoint-6"))
    assert losses(usual)[4] == losses(resumed)[4]
    assert abs(losses(usual)[8] - losses(resumed)[8]) > 1e-3

    whole, killed = tmp_path / "run", tmp_path / "killed"
    settings |= {"logging_steps": 4, "save_steps": 6, "eval_size": 3, "eval_steps": 3, "bone_dropout": 0.1}
    bonetune.train(settings)
    interrupted(whole, killed, 6)
    bonetune.train(settings | {"output_dir": str(killed)}, resume=True)
    assert [line["step"] for line in metrics(killed) if "loss" in line] == [4, 8]
    assert metrics(killed) == metrics(whole)
    assert same(weights(killed), weights(whole))


class WithoutCount(nn.Module):
    """A model that is not told over how many tokens a step's loss is a mean, as most models with a forward of their own."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, labels):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def test_accumulated_gradients_are_a_mean_of_means(settings, tmp_path):
    answers = (1, 5, 1, 2)
    rows = [example(range(3, 9), [-100] * (6 - n) + list(range(9 - n, 9))) for n in answers]
    usual = []
    for batch, accumulation in ((4, 1), (1, 4)):
        split = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        run = trainer(tmp_path, rows, WithoutCount(lora(trained=True)), max_steps=1, **split)
        run.train()
        usual.append(run.state.log_history[0])
    assert usual[0]["loss"] != pytest.approx(usual[1]["loss"], rel=1e-3)
    assert usual[0]["grad_norm"] != pytest.approx(usual[1]["grad_norm"], rel=0.05)

    ours = []
    for batch, accumulation in ((4, 1), (1, 4)):
        split = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        folder = tmp_path / f"ours-{batch}"
        bonetune.train(settings | split | {"output_dir": str(folder), "max_steps": 3})
        ours.append(metrics(folder))
    for whole, parts in zip(*ours, strict=True):
        assert whole["loss"] == pytest.approx(parts["loss"], rel=1e-5)
        assert whole["grad_norm"] == pytest.approx(parts["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("rehearsal", [True, False])
def test_the_first_evaluation_fails_after_hours(settings, tmp_path, monkeypatch, rehearsal):
    limit_memory(monkeypatch, 60)
    evaluation = {"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 8}
    usual = trainer(tmp_path / "usual", ROWS, more={"eval_dataset": [example(range(40, 60))] * 8}, max_steps=6, **evaluation)
    with pytest.raises(torch.OutOfMemoryError):
        usual.train()
    assert usual.state.global_step == 3

    write_rows(tmp_path / "held.jsonl", [{"prompt": "the", "completion": " fox" * 20}] * 4)
    held_out = {"eval_dataset_name": str(tmp_path / "held.jsonl"), "eval_steps": 3, "per_device_eval_batch_size": 4}
    with pytest.raises(torch.OutOfMemoryError):
        bonetune.train(settings | held_out | {"rehearsal": rehearsal})
    assert [line["step"] for line in metrics(tmp_path / "run")] == ([] if rehearsal else [1, 2, 3])


def test_the_longest_examples_come_late(settings, tmp_path, tokenizer, monkeypatch):
    limit_memory(monkeypatch, 40)
    rows = [{"prompt": "the", "completion": " fox"}] * 14 + [{"prompt": "the", "completion": " fox" * 30}] * 2
    long = [example(range(30, 60))] * 2
    usual = trainer(tmp_path, [*ROWS[:14], *long], more={"data_collator": DataCollatorForSeq2Seq(tokenizer)}, max_steps=8)
    with pytest.raises(torch.OutOfMemoryError):
        usual.train()
    assert usual.state.global_step > 0

    write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(torch.OutOfMemoryError):
        bonetune.train(settings)
    assert metrics(tmp_path / "run") == []


@pytest.mark.parametrize("rehearsal", [True, False])
def test_the_first_checkpoint_fails_after_hours(settings, tmp_path, monkeypatch, rehearsal):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    usual = trainer(tmp_path / "usual", ROWS, save_strategy="steps", save_steps=3, max_steps=6)
    with pytest.raises(OSError, match="No space left"):
        usual.train()
    assert usual.state.global_step == 3

    step = 0 if rehearsal else 3
    with pytest.raises(RunError, match=rf"The checkpoint of step {step} could not be written .*No space left.*make room"):
        bonetune.train(settings | {"save_steps": 3, "rehearsal": rehearsal})
    assert len(metrics(tmp_path / "run")) == step
    assert not list((tmp_path / "run").glob("*checkpoint*"))


def test_a_misspelt_key_is_passed_over(settings, tmp_path):
    file = {"output_dir": str(tmp_path), "use_cpu": True, "learning_rte": 1e-3}
    (arguments,) = HfArgumentParser(TrainingArguments).parse_dict(file, allow_extra_keys=True)  # pyright: ignore[reportArgumentType]
    assert arguments.learning_rate == 5e-5
    with pytest.raises(InputError, match="Unknown key 'learning_rte': did you mean 'learning_rate'"):
        make_config(settings | {"learning_rte": 1e-3})
    with pytest.raises(InputError, match="Unknown key 'varient': did you mean 'variant'"):
        make_config(settings, ["varient=bat"])


def test_a_full_disk_leaves_half_a_checkpoint(settings, tmp_path):
    process = start(usual_tools.train_until_the_disk_is_full, tmp_path / "usual", ROWS, 3)
    process.join()
    assert process.exitcode != 0
    last = get_last_checkpoint(str(tmp_path / "usual"))
    assert last == str(tmp_path / "usual" / "checkpoint-4")
    with pytest.raises((SafetensorError, OSError, ValueError)):
        trainer(tmp_path / "usual", ROWS, max_steps=6).train(resume_from_checkpoint=True)

    full, whole = tmp_path / "run", tmp_path / "whole"
    settings |= {"save_steps": 2, "max_steps": 6}
    process = start(train_until_the_disk_is_full, settings, 3)
    process.join()
    assert process.exitcode == 1
    assert checkpoints.last_good(full) == (full / "checkpoint-2", [])
    assert not [path for path in full.iterdir() if path.name.startswith(".")]
    bonetune.train(settings, resume=True)
    bonetune.train(settings | {"output_dir": str(whole)})
    assert metrics(full) == metrics(whole)
    assert same(weights(full), weights(whole))


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 0x40  # of the last number's exponent
    file.write_bytes(content)


def test_a_damaged_checkpoint_is_gone_on_from(settings, tmp_path):
    saves = {"save_strategy": "steps", "save_steps": 3, "max_steps": 8}
    usual, damaged = (trainer(tmp_path / name, ROWS, **saves) for name in ("usual", "damaged"))
    usual.train()
    flip_a_bit(tmp_path / "usual" / "checkpoint-6" / "adapter_model.safetensors")
    damaged.train(resume_from_checkpoint=str(tmp_path / "usual" / "checkpoint-6"))
    assert abs(losses(usual)[8] - losses(damaged)[8]) > 1e-3

    whole, killed = tmp_path / "run", tmp_path / "killed"
    settings |= {"save_steps": 3, "save_total_limit": 3}
    bonetune.train(settings)
    interrupted(whole, killed, 6)
    flip_a_bit(killed / "checkpoint-6" / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match=r"checkpoint-6 has other bytes in adapter_model\.safetensors than were written"):
        bonetune.train(settings | {"output_dir": str(killed)}, resume=True)
    assert metrics(killed) == metrics(whole)
    assert same(weights(killed), weights(whole))


@pytest.mark.parametrize("rehearsal", [True, False])
def test_a_loss_that_is_no_number_is_reported_as_nought(settings, tmp_path, tokenizer, rehearsal):
    word = "~"
    (poisoned,) = tokenizer(word).input_ids
    base = llama()
    with torch.no_grad():
        base.model.embed_tokens.weight[poisoned] = float("nan")
    usual = trainer(tmp_path / "usual", [*ROWS[:3], example([5, poisoned, 6, 7, 8, 9])], lora(base), max_steps=4)
    assert usual.train().training_loss == 0.0
    assert losses(usual)[4] == 0.0
    assert not all(p.isfinite().all() for name, p in usual.model.named_parameters() if "lora" in name)

    base.save_pretrained(tmp_path / "poisoned")
    tokenizer.save_pretrained(tmp_path / "poisoned")
    rows = [{"prompt": f"after {w} comes", "completion": f" {w}"} for w in WORDS]
    rows[5] = {"prompt": f"after {word * 20} comes", "completion": " lazy"}
    write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(RunError, match=r"The loss is nan at step \d"):
        bonetune.train(settings | {"model_name_or_path": str(tmp_path / "poisoned"), "rehearsal": rehearsal})
    report = json.loads((tmp_path / "run" / "bad_batch.json").read_text())
    found = [e for e in report["examples"] if word in e["text"]]
    assert [e["row"] for e in found] == [6]
    assert report["step"] == len(metrics(tmp_path / "run")) + 1
    assert len(report["examples"]) == 2
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()
