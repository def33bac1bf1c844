"""Two processes under torchrun make the run of one process, and only the first one writes and speaks.

One launch runs every case; what the processes leave is compared with the same settings in one process, whose batch is as large
as theirs together.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from conftest import llama
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BertConfig, BertModel, T5Config, T5ForConditionalGeneration

import bonetune
from bonetune.errors import InputError
from bonetune.models import load_model
from bonetune.training import plan

PROCESSES, SECONDS = 2, 280
WORDS = ["the", "quick", "brown", "fox", "lazy", "dog"]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# By name: settings, and how many forwards of the two processes make the step of 8 examples.
CASES = {
    "padded": ({"packing": False, "num_train_epochs": 2}, 1),
    "packed, accumulated": ({"packing": True, "num_train_epochs": 2}, 2),
    "more forwards than examples": ({"packing": False, "num_train_epochs": 1, "gradient_checkpointing": True}, 4),
    "adamw": ({"optim": "adamw_torch", "num_train_epochs": 1}, 1),
    "weighted": ({"dataset_name": ["rows.jsonl", "more.jsonl"], "dataset_weights": [1, 3], "max_steps": 5}, 2),
    "streamed": ({"streaming": True, "truncation": "drop", "shuffle_buffer_size": 16, "max_steps": 7, "eval_steps": 3}, 1),
    "classes": ({"task_type": "SEQ_CLS", "model_name_or_path": "bert", "dataset_name": "labels.jsonl"}, 2),
    "numbers": ({"task_type": "SEQ_CLS", "model_name_or_path": "bert", "dataset_name": "numbers.jsonl"}, 1),
    "rewriting": ({"task_type": "SEQ_2_SEQ_LM", "model_name_or_path": "t5"}, 2),
}
FSDP = {"fsdp padded": ({"packing": False, "num_train_epochs": 1}, 1), "fsdp packed": ({"packing": True, "max_steps": 5}, 2)}


def save(folder, tokenizer):
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320}
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    ends = {"pad_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1}
    for name, model in (
        ("llama", llama()),
        ("bert", BertModel(BertConfig(**small, **NO_DROPOUT, pad_token_id=1))),
        ("t5", T5ForConditionalGeneration(T5Config(vocab_size=320, **sizes, **ends))),
    ):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    both = [(n, f"after {a} {b} comes", f" {b}" * (1 + n % 5)) for n, (a, b) in enumerate((a, b) for a in WORDS for b in WORDS)]
    held_out, rows = (
        [{"prompt": p, "completion": c} for _, p, c in both[33:]],
        [{"prompt": p, "completion": c} for _, p, c in both],
    )
    files = {
        "rows": rows[:33],  # the last step of an epoch has one example
        "more": [{"text": f"{c} and {p}"} for _, p, c in both[:9]],
        "held_out": [*held_out, *held_out[:2]],
        "labels": [{"text": p, "label": ["bad", "fine", "good"][n % 3]} for n, p, _ in both[:33]],
        "labels_held_out": [{"text": p, "label": ["fine", "good", "bad"][n % 3]} for n, p, _ in both[:5]],
        "numbers": [{"text": p, "label": n / 10 + 0.05} for n, p, _ in both[:33]],
        "numbers_held_out": [{"text": p, "label": n / 7 + 0.05} for n, p, _ in both[:5]],
    }
    for name, content in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))


def settings_of(folder, more, output):
    found = {
        "model_name_or_path": "llama",
        "dataset_name": "rows.jsonl",
        "output_dir": output,
        "r": 4,
        "optim": "sgd",
        "learning_rate": 3e-3,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 2,  # 5 rows are 3 batches, and one process goes without
        "cache_tokens": False,
        "sample_prompts": 0,
        **more,
    }
    named = found["dataset_name"]
    held_out = (
        f"{named.removesuffix('.jsonl')}_held_out.jsonl" if named in ("labels.jsonl", "numbers.jsonl") else "held_out.jsonl"
    )
    found["eval_dataset_name"] = str(folder / held_out)
    found["dataset_name"] = str(folder / named) if isinstance(named, str) else [str(folder / name) for name in named]
    return found | {"model_name_or_path": str(folder / found["model_name_or_path"])}


def shared(settings, accumulation):
    sizes = {"per_device_train_batch_size": 8 // PROCESSES // accumulation, "gradient_accumulation_steps": accumulation}
    return settings | sizes | {"output_dir": settings["output_dir"] + " by two"}


def lines(run, name="metrics.jsonl"):
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def torchrun(*arguments):
    """A launcher that is to start `PROCESSES` of what `arguments` name."""
    paths = [str(Path(bonetune.__file__).parents[1]), *(path for path in sys.path if path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    loopback = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    if loopback:  # the machine's own name may lead nowhere
        environment["GLOO_SOCKET_IFNAME"] = loopback[0]
    port = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--local-addr", "localhost"]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(PROCESSES), *port, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(launcher):
    try:
        return (*launcher.communicate(timeout=SECONDS), launcher.returncode)
    except subprocess.TimeoutExpired:
        launcher.terminate()  # and with it the processes
        raise AssertionError(f"not done within {SECONDS} s:\n{launcher.communicate()[1][-4000:]}") from None


@pytest.fixture(scope="module")
def folder(tmp_path_factory, _tokenizer):
    folder = tmp_path_factory.mktemp("distributed")
    save(folder, _tokenizer)
    return folder


def both_ways(folder, cases, mode):
    told = {name: settings_of(folder, more, str(folder / name)) for name, (more, _) in cases.items()}
    by_two = {name: shared(told[name], accumulation) for name, (_, accumulation) in cases.items()}
    (folder / f"{mode}.json").write_text(json.dumps(by_two))
    launcher = torchrun(str(Path(__file__).resolve()), mode, str(folder / f"{mode}.json"))
    for settings in told.values():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            bonetune.train(settings)
    out, said, code = finish(launcher)
    assert code == 0, said[-6000:]
    return out


@pytest.fixture(scope="module")
def trained(folder):
    return both_ways(folder, CASES, "ddp")


@pytest.fixture(scope="module")
def trained_in_shards(folder):
    return both_ways(folder, FSDP, "fsdp")


def check_same(folder, name, more):
    one, two = folder / name, folder / f"{name} by two"
    for a, b in zip(lines(one), lines(two), strict=True):
        for key in a.keys() - {"seconds", "memory_bytes", "padded_tokens"}:
            assert b[key] == pytest.approx(a[key], rel=1e-3 if "adamw" in str(more) else 1e-4, abs=1e-6), (a["step"], key)
    assert sum("eval_loss" in line for line in lines(one)) >= 1
    ends = [load_file(run / "adapter_model.safetensors") for run in (one, two)]
    start = [tensor for key, tensor in ends[0].items() if "bone_block" in key]
    assert ends[0].keys() == ends[1].keys()
    assert all(tensor.norm() > 0 for tensor in start)
    for key, tensor in ends[0].items():
        # adapters begin at zero: what is compared is the way gone; Adam gives entries without a gradient a step at random
        assert (ends[1][key] - tensor).norm() < (0.05 if "adamw" in str(more) else 1e-3) * tensor.norm(), key
    assert [path.name for path in two.iterdir() if path.name.startswith((".", "rank"))] == []
    assert json.loads((two / "summary.json").read_text())["devices"] == PROCESSES


@pytest.mark.parametrize("name", CASES)
def test_two_processes_make_the_run_of_one(trained, folder, name):
    check_same(folder, name, CASES[name][0])


def test_an_epochs_last_step_had_fewer_examples_than_devices(trained, folder):
    """Otherwise the test above would not show it."""
    steps = lines(folder / "padded by two")
    tokens = [line["tokens"] for line in steps if "loss" in line]
    assert tokens[4] - tokens[3] < (tokens[3] - tokens[2]) / 4


@pytest.mark.parametrize("name", FSDP)
def test_two_processes_with_shards_of_the_weights_make_the_run_of_one(trained_in_shards, folder, name):
    assert "sharded: True" in trained_in_shards
    check_same(folder, name, FSDP[name][0])
    loaded = load_model(str(folder / f"{name} by two"))
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        expected = load_model(str(folder / name)).model(ids).logits
        torch.testing.assert_close(loaded.model(ids).logits, expected, rtol=1e-3, atol=1e-3)
        base = AutoModelForCausalLM.from_pretrained(folder / "llama")(ids).logits
        assert (base - expected).norm() > 1e-2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"fsdp": True}, "fsdp needs GPUs, and there are none here"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "deepspeed is set, and the package is not installed: pip install"),
    ],
)
def test_sharding_that_cannot_be_had(folder, tmp_path, monkeypatch, more, message):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    with pytest.raises(InputError, match=message):
        plan(settings_of(folder, more, str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_sharding_needs_several_devices(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    with pytest.raises(InputError, match="fsdp shares the weights out over several devices, and there is one process"):
        plan(settings_of(folder, {"fsdp": True}, str(tmp_path / "run")))


ENDLESS = {"packing": False, "max_steps": 2000, "lr_scheduler_type": "constant", "warmup_steps": 0, "save_steps": 1000}


def configured(folder, name):
    settings = shared(settings_of(folder, ENDLESS, str(folder / name)), 1)
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(settings))  # which YAML can read
    return settings, file


def begun(run, launcher, steps):
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        assert launcher.poll() is None, launcher.communicate()[1][-4000:]
        with contextlib.suppress(FileNotFoundError):
            if (run / "metrics.jsonl").read_text().count('"loss"') >= steps:
                return
        time.sleep(0.05)
    launcher.terminate()
    raise AssertionError("no steps were made")


def children(pid):
    return [int(line) for line in subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()]


@pytest.mark.slow
@pytest.mark.parametrize("told", ["the launcher", "one process"])
def test_a_sigterm_ends_all_after_one_step_and_the_run_goes_on(folder, told):
    settings, file = configured(folder, f"SIGTERM to {told}")
    run = Path(settings["output_dir"])
    launcher = torchrun("-m", "bonetune_cli", "train", str(file))
    begun(run, launcher, 5)
    os.kill(launcher.pid if told == "the launcher" else children(launcher.pid)[-1], signal.SIGTERM)
    out, said, code = finish(launcher)
    assert code != 0
    (step,) = (int(path.name.removeprefix("checkpoint-")) for path in run.glob("checkpoint-*") if path.name != "checkpoint-0")
    assert said.count(f"Ended by SIGTERM after step {step} of 2000; go on with --resume.") == 1
    assert out == ""
    assert not (run / "adapter_model.safetensors").exists()
    assert [line["step"] for line in lines(run) if "loss" in line] == list(range(1, step + 1))
    steps = step + 5
    if told == "the launcher":  # on with another number of devices
        bonetune.train(settings, {"max_steps": steps, "per_device_train_batch_size": 8}, resume=True)
    else:
        launcher = torchrun("-m", "bonetune_cli", "train", str(file), f"max_steps={steps}", "--resume")
        out, said, code = finish(launcher)
        assert code == 0, said[-4000:]
        assert out.count("metrics.jsonl and loss.png are in") == 1
        assert said.count("trainable parameters") == 1
    whole = f"{run} by one"
    bonetune.train(settings, {"max_steps": steps, "per_device_train_batch_size": 8, "output_dir": whole})
    losses = [[line["loss"] for line in lines(Path(path)) if "loss" in line] for path in (run, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# What the processes run.


def run_all(mode, file):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if mode == "fsdp":
        _shard_on_cpus()
    for settings in json.loads(Path(file).read_text()).values():
        bonetune.train(settings | ({"fsdp": True} if mode == "fsdp" else {}), on_plan=_say_that_it_is_the_first)


def _say_that_it_is_the_first(planned):
    assert os.environ["RANK"] == "0"


def _shard_on_cpus():
    """Let accelerate, which shards on accelerators only, take processes on a CPU for such."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType
    from torch.distributed.tensor import DTensor

    from bonetune.training import preflight, trainer

    arguments_of = trainer.training_arguments
    preflight.check_surroundings = lambda config: None

    def told(planned):
        arguments = arguments_of(planned)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return arguments

    def gathered(self):
        if os.environ["RANK"] == "0":
            print("sharded:", all(isinstance(p, DTensor) for p in self.model.parameters()))  # noqa: T201
        return gathered_adapter(self)

    gathered_adapter = trainer.BoneTrainer.gathered_adapter
    trainer.training_arguments, trainer.BoneTrainer.gathered_adapter = told, gathered


if __name__ == "__main__":
    run_all(*sys.argv[1:])
