"""A run that is killed at any moment and resumed is the run that was never killed, bit for bit."""

import json
import os
import random
import signal
import time

import pytest
import torch
from processes import start, train
from safetensors.torch import load_file

WORDS = ["the", "quick", "brown", "fox", "lazy", "dog", "user", "system"]
STEPS = 90
KILLS = 10


@pytest.fixture
def settings(tmp_path, model_folder):
    rows = [{"prompt": f"after {a} {b} comes", "completion": f" {b}" * n} for a in WORDS for n, b in enumerate(WORDS, 1)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model_name_or_path": str(model_folder),
        "dataset_name": str(tmp_path / "rows.jsonl"),
        "eval_size": 8,
        "r": 4,
        "bone_dropout": 0.1,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "max_steps": STEPS,
        "logging_steps": 2,
        "eval_steps": 7,
        "save_steps": 3,
        "sample_prompts": 1,
        "sample_tokens": 2,
    }


def metrics(folder):
    """The lines that are whole, without what is different each time."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "memory_bytes")} for line in lines]


def steps_done(folder):
    lines = metrics(folder)
    return lines[-1]["step"] if lines else 0


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool((a == b) if not hasattr(a, "all") else (a == b).all())


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"packing": False, "variant": "bat-row"},
        {"streaming": True, "eval_size": None, "eval_steps": None, "truncation": "drop"},
    ],
)
def test_ten_kills_change_nothing(settings, tmp_path, more):
    settings |= more
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(train, settings | {"output_dir": str(whole)}, {})
    process.join()
    assert process.exitcode == 0
    chance = random.Random(0)
    kills = 0
    while True:
        resume = any(killed.glob("checkpoint-*"))
        process = start(train, settings | {"output_dir": str(killed)}, {"resume": True} if resume else {"overwrite": True})
        if kills < KILLS:
            # some are killed wherever they are after a time, most after some steps and a little more
            if chance.random() < 0.3:
                time.sleep(chance.uniform(0, 1.5))
            else:
                goal = steps_done(killed) + chance.randint(1, 8)
                while steps_done(killed) < goal and process.is_alive():
                    time.sleep(0.002)
                time.sleep(chance.uniform(0, 0.1))
            assert process.is_alive(), "the run ended before it was killed often enough"
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            assert process.exitcode == -signal.SIGKILL
            kills += 1
            assert not (killed / "adapter_model.safetensors").exists()
        else:
            process.join()
            assert process.exitcode == 0
            break
    assert metrics(killed) == metrics(whole)
    last = f"checkpoint-{STEPS}"
    for place in ("", last):
        ours, theirs = (load_file(folder / place / "adapter_model.safetensors") for folder in (killed, whole))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        ours, theirs = (torch.load(folder / last / name, weights_only=False) for folder in (killed, whole))
        assert same(ours, theirs), name
    assert not [path for path in killed.iterdir() if path.name.startswith(".")]


def test_sigterm_leaves_a_checkpoint_and_the_run_goes_on_from_it(settings, tmp_path):
    settings |= {"save_steps": 1000, "rehearsal": False}
    whole, ended = tmp_path / "whole", tmp_path / "ended"
    process = start(train, settings | {"output_dir": str(whole)}, {})
    process.join()
    process = start(train, settings | {"output_dir": str(ended)}, {})
    while steps_done(ended) < 7:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 143
    assert len(list(ended.glob("checkpoint-*"))) == 1
    assert not (ended / "adapter_model.safetensors").exists()
    process = start(train, settings | {"output_dir": str(ended)}, {"resume": True})
    process.join()
    assert process.exitcode == 0
    assert metrics(ended) == [line for line in metrics(whole) if line["step"] > 0]
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (ended, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_process_killed_after_its_last_step_has_only_to_finish(settings, tmp_path):
    run = tmp_path / "run"
    settings |= {"output_dir": str(run), "max_steps": 6}
    start(train, settings, {}).join()
    adapter = load_file(run / "adapter_model.safetensors")
    lines = metrics(run)
    for name in ("adapter_model.safetensors", "adapter_config.json", "loss.png", "report.html"):
        (run / name).unlink()
    process = start(train, settings, {"resume": True})
    process.join()
    assert process.exitcode == 0
    again = load_file(run / "adapter_model.safetensors")
    assert all(torch.equal(again[name], adapter[name]) for name in adapter)
    assert metrics(run) == lines
    assert (run / "report.html").is_file()
