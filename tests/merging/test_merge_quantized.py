"""Adapters trained on quantized weights, merged into what these stood for, or into the weights from before."""

import json
import sys

import pytest
import torch
from adapted_models import IDS
from conftest import llama
from transformers import AutoModelForCausalLM

import bonetune
from bonetune.errors import RunError
from bonetune.models import load_model
from bonetune.tuner.dequantize import dequantize_layers

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

# What quantizing moves the logits by, at least, in relation to their size.
KINDS = {"nf4": 0.05, "fp4": 0.05, "int8": 0.002, "torchao-int8": 0.002, "torchao-int4": 0.05}
WORDS = ["the", "quick", "brown", "fox", "lazy", "dog"]


@pytest.fixture(scope="module")
def base(tmp_path_factory, _tokenizer):
    folder = tmp_path_factory.mktemp("base")
    llama(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    _tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def trained(base, tmp_path):
    def run(kind, **more):
        rows = [{"prompt": f"after {a} {b} comes", "completion": f" {b}"} for a in WORDS for b in WORDS]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {
            "model_name_or_path": str(base),
            "dataset_name": str(tmp_path / "rows.jsonl"),
            "output_dir": str(tmp_path / "run"),
            "quantization": kind,
            "r": 4,
            "learning_rate": 3e-3,
            "max_steps": 8,
            "sample_prompts": 0,
            "cache_tokens": False,
        }
        bonetune.train(settings | more)
        return str(tmp_path / "run")

    return run


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.float()


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("kind", KINDS)
def test_the_values_that_were_trained_on_make_the_trained_model(trained, tmp_path, kind):
    run = trained(kind)
    into_values = bonetune.merge(run, str(tmp_path / "values"))
    assert (into_values.into, into_values.certificate.holds) == ("trained", True)
    assert into_values.certificate.dtype == "float32"
    assert not into_values.other.holds
    assert into_values.other.error > KINDS[kind] * into_values.other.size
    into_weights = bonetune.merge(run, str(tmp_path / "weights"), into="original")
    assert (into_weights.into, into_weights.certificate.holds) == ("original", True)
    assert not into_weights.other.holds

    as_trained = load_model(run).model
    with_codes = logits(as_trained)
    dequantize_layers(as_trained)
    with_values = logits(as_trained)
    values, weights = (logits(AutoModelForCausalLM.from_pretrained(tmp_path / name)) for name in ("values", "weights"))
    assert distance(values, with_values) < 1e-5
    assert distance(values, with_codes) < 0.03
    assert distance(weights, with_values) > KINDS[kind]
    assert distance(weights, logits(load_model(run, quantized=False).model)) < 1e-5
    config = json.loads((tmp_path / "values" / "config.json").read_text())
    assert "quantization_config" not in config


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao-int4"])
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_dtypes_after_a_run_in_bfloat16(trained, tmp_path, kind, dtype):
    run = trained(kind, dtype="bfloat16")
    assert load_model(run).model.get_base_model().lm_head.weight.dtype == torch.bfloat16
    result = bonetune.merge(run, str(tmp_path / "merged"), dtype=dtype)
    assert result.certificate.holds
    # bitsandbytes' int8 says float32 values, which bfloat16 would round
    written = {"auto": torch.float32 if kind == "int8" else torch.bfloat16}.get(dtype, getattr(torch, dtype, None))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert {p.dtype for p in merged.parameters()} == {written}


def test_values_that_are_not_those_of_the_codes_are_noticed(trained, tmp_path, monkeypatch):
    run = trained("nf4")

    def wrong(model):
        plain = dequantize_layers(model)
        with torch.no_grad():
            for layer in plain:
                layer.weight.mul_(1.2)
        return plain

    monkeypatch.setattr(sys.modules["bonetune.merging.memory"], "dequantize_layers", wrong)
    with pytest.raises(RunError, match=r"not those that .* was trained on"):
        bonetune.merge(run, str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()
