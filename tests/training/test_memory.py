"""Predicted memory: its parts counted on the real model, its sum against what real steps take."""

import json
import os
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import llama
from peft import get_peft_model

from bonetune.errors import InputError
from bonetune.models import load_base
from bonetune.training import memory
from bonetune.training.config import make_config
from bonetune.training.live_storages import LiveStorages
from bonetune.training.memory import WorstBatch, predict, worst_batch
from bonetune.training.plan import adapter_config

SMALL = WorstBatch((16, 16))


@pytest.fixture
def settings(model_folder):
    def make(**changes):
        given = {"model_name_or_path": str(model_folder), "dataset_name": "unread", "output_dir": "unused", "r": 4}
        return make_config(given | changes)

    return make


def bytes_of(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"variant": "bat"},
        {"variant": "mini", "mini_r": 4},
        {"target_modules": ("q_proj",), "rank_pattern": {r".*\.0\..*": 8}},
        {"modules_to_save": ("lm_head",)},
        {"dtype": "bfloat16"},
    ],
    ids=str,
)
def test_weights_by_category_are_the_real_model_s(settings, changes):
    config = settings(**changes)
    found = predict(config, SMALL, device="cpu")
    model = get_peft_model(base := load_base(config.model_name_or_path, config.dtype).model, adapter_config(config, base))
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert found.adapter == bytes_of(trained)
    assert found.frozen == bytes_of(frozen) + bytes_of(model.buffers())
    assert found.optimizer == 2 * bytes_of(trained) + 4 * len(trained)  # AdamW: two moments, and the number of the step


@pytest.mark.parametrize("changes", [{}, {"variant": "bat-row"}, {"gradient_checkpointing": True}, {"packing": True}], ids=str)
def test_a_step_without_values_takes_what_a_real_one_takes(settings, changes):
    """The same notes of a step with values."""
    config = settings(**({"packing": False} | changes))
    batch = WorstBatch((64,) * 8, bool(config.packing))
    model = get_peft_model(base := llama(), adapter_config(config, base))
    real = LiveStorages()
    with real:
        real.assign((p for p in memory._tensors(model) if not p.requires_grad), "frozen")
        real.assign((p for p in model.parameters() if p.requires_grad), "adapter")
        memory._train_for_two_steps(model, config, batch, "cpu", real)
    found = predict(config, batch, device="cpu")
    total = found.total - found.holes - memory.SCRATCH
    assert total == pytest.approx(sum(real.peak().values()), rel=0.02)
    assert found.activations == pytest.approx(real.peak()["activations"], rel=0.02)


def test_what_takes_more_is_predicted_to_take_more(settings):
    long, short = WorstBatch((64,) * 8), WorstBatch((32,) * 8)

    def parts(batch, **changes):
        return predict(settings(packing=False, **changes), batch, device="cpu")

    plain = parts(long)
    assert parts(short).activations == pytest.approx(plain.activations / 2, rel=0.05)
    assert parts(long, gradient_checkpointing=True).activations < plain.activations / 2
    assert parts(long, bf16=True).activations < plain.activations
    assert parts(long, optim="sgd").optimizer == 0
    assert parts(long, gradient_accumulation_steps=2).gradients > plain.gradients


@pytest.mark.parametrize(("quantization", "double"), [("nf4", False), ("nf4", True), ("int8", False)])
def test_quantized_weights_take_what_bitsandbytes_takes(settings, quantization, double):
    bnb = pytest.importorskip("bitsandbytes")
    inside = llama().model.layers
    linears = [module for module in inside.modules() if isinstance(module, torch.nn.Linear)]
    rest = bytes_of(llama().parameters()) - bytes_of(layer.weight for layer in linears)
    coded = 0
    for layer in linears:
        if quantization == "nf4":
            codes, state = bnb.functional.quantize_4bit(layer.weight.data, quant_type="nf4", compress_statistics=double)
            coded += bytes_of([codes, state.absmax]) + (bytes_of([state.state2.absmax]) if double else 0)
        else:
            codes, scales, _ = bnb.functional.int8_vectorwise_quant(layer.weight.data.half())
            coded += bytes_of([codes, scales])
    config = settings(quantization=quantization, bnb_4bit_use_double_quant=double, dtype="float32")
    found = predict(config, SMALL, device="cpu")
    assert found.frozen == pytest.approx(rest + coded + bytes_of(llama().buffers()), rel=0.01)


def test_the_worst_batch(settings):
    config = settings(per_device_train_batch_size=3, max_length=100)
    assert worst_batch(config) == WorstBatch((100, 100, 100), packed=True)
    assert worst_batch(config, np.array([5, 90, 7, 20])).lengths == (90, 20, 7)
    assert not worst_batch(settings(packing=False)).packed
    assert not worst_batch(settings(task_type="SEQ_CLS")).packed


def test_what_cannot_be_run_without_values_is_said(settings, monkeypatch):
    def loss(model, **inputs):
        return model(input_ids=inputs["input_ids"]).logits.sum() if bool(model.lm_head.weight.sum() > 0) else None

    task = memory.task_named("CAUSAL_LM")
    monkeypatch.setattr(memory, "_resident_when_warm", lambda: 0)
    monkeypatch.setattr(memory, "task_of", lambda config: type(task)(config.task_type, loss, task.supervised))
    with pytest.raises(InputError, match=r"LlamaForCausalLM cannot be run without values .*--measure"):
        predict(settings(packing=False), SMALL, device="cpu")


def test_a_model_that_is_not_there(settings, tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        predict(settings(model_name_or_path=str(tmp_path / "none")), SMALL, device="cpu")


_BOTH = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
from bonetune.models import smollm2
from bonetune.training.config import make_config
from bonetune.training.memory import WorstBatch, measure, predict

torch.set_num_threads(1)
settings = {"model_name_or_path": smollm2(), "dataset_name": "unread", "output_dir": "unused", "packing": False}
batch, changes = WorstBatch(tuple(json.loads(sys.argv[1]))), json.loads(sys.argv[2])
config = make_config(settings | changes)
measured = measure(config, batch)
predicted = predict(config, batch, device=measured.device)
print(json.dumps([predicted.total, predicted.total - predicted.holes, measured.total]))
"""
# glibc told to give back every block at once
_WITHOUT_HOLES = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000"}


def predicted_and_measured(batch, changes, environment):
    """(Predicted, predicted without holes, measured) in a process of its own."""
    command = [sys.executable, "-c", _BOTH, json.dumps(batch), json.dumps(changes)]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=clean | environment)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or torch.cuda.is_available(), reason="of glibc's heap")
@pytest.mark.parametrize(
    ("batch", "changes"),
    [
        ([128] * 2, {}),
        ([256] * 4, {}),
        ([256] * 4, {"variant": "bat"}),
        ([256] * 4, {"gradient_checkpointing": True}),
        ([256] * 4, {"dtype": "float32"}),
    ],
    ids=str,
)
def test_within_a_tenth_of_what_real_steps_take(batch, changes):
    _, predicted, measured = predicted_and_measured(batch, changes, _WITHOUT_HOLES)
    assert predicted == pytest.approx(measured, rel=0.1)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or torch.cuda.is_available(), reason="of glibc's heap")
@pytest.mark.parametrize("batch", [[128] * 2, [256] * 4], ids=str)
def test_within_a_tenth_with_the_holes_of_a_heap(batch):
    predicted, _, measured = predicted_and_measured(batch, {}, {})
    assert predicted == pytest.approx(measured, rel=0.1)
