"""Runs on quantized bases: the codes stay, the adapter learns in float32, and a killed run goes on as it would have gone."""

import json

import pytest
import torch
from conftest import llama
from interrupted import killed_and_resumed
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

import bonetune
from bonetune import BoneLayer
from bonetune.models import load_model
from bonetune.training import plan

pytest.importorskip("bitsandbytes")
torchao = pytest.importorskip("torchao")

KINDS = ["nf4", "fp4", "int8", "torchao-int8", "torchao-int4"]
WORDS = ["the", "quick", "brown", "fox", "lazy", "dog"]


@pytest.fixture
def settings(tmp_path, tokenizer):
    """On a base whose weights can be quantized in groups of 64."""
    llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"prompt": f"after {a} {b} comes", "completion": f" {b}"} for a in WORDS for b in WORDS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model_name_or_path": str(tmp_path / "base"),
        "dataset_name": str(tmp_path / "rows.jsonl"),
        "eval_size": 6,
        "output_dir": str(tmp_path / "run"),
        "r": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "max_steps": 8,
        "save_steps": 3,
        "eval_steps": 4,
        "sample_prompts": 0,
        "cache_tokens": False,
    }


def contents(value):
    if isinstance(value, torchao.utils.TorchAOBaseTensor):
        return [getattr(value, name).tolist() for name in value.tensor_data_names]
    return value.tolist()


def frozen(model):
    """Codes and scales, and what is not quantized, by name."""
    return {key: contents(value) for key, value in model.state_dict().items() if "bone_block" not in key}


def losses(run, name="loss"):
    return [line[name] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if name in line]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_codes(settings, tmp_path, kind):
    before, seen = {}, []

    def look(planned):
        seen.append(planned.model)
        before.update(frozen(planned.model))

    result = bonetune.train(settings | {"quantization": kind}, on_plan=look)
    assert result.last_loss < 0.9 * result.first_loss
    evaluated = losses(tmp_path / "run", "eval_loss")
    assert evaluated[-1] < evaluated[0]
    assert frozen(seen[0]) == before
    layers = [module for module in seen[0].modules() if isinstance(module, BoneLayer)]
    assert all(layer.quantization_backend is not None for layer in layers)
    trained = {name: p for name, p in seen[0].named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert all(p.norm() > 0 for p in trained.values())
    again = load_model(str(tmp_path / "run")).model
    assert frozen(again) == before
    ids = torch.arange(2, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, seen[0].eval()(ids).logits, rtol=1e-6, atol=1e-6)
        with again.disable_adapter():
            plain = again(ids).logits
        assert (plain - again(ids).logits).norm() > 0.1 * plain.norm()
    (scored,) = bonetune.evaluate(str(tmp_path / "run"), ["loss"], data=settings["dataset_name"], limit=6)
    assert scored.score < evaluated[0]


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_activations_and_a_resumed_run_change_nothing(settings, tmp_path, kind):
    settings |= {"quantization": kind}
    bonetune.train(settings)
    again = settings | {"output_dir": str(tmp_path / "again"), "gradient_checkpointing": True}
    killed_and_resumed(again, 5)
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "run"), rel=1e-5)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("run", "again"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("dtype", "computes_in"), [("auto", torch.bfloat16), ("float32", torch.float32)])
def test_what_products_with_four_bits_are_computed_in(settings, dtype, computes_in):
    planned = plan(settings | {"quantization": "nf4", "dtype": dtype, "bnb_4bit_use_double_quant": True})
    layers = [module.base_layer for module in planned.model.modules() if isinstance(module, BoneLayer)]
    assert {layer.compute_dtype for layer in layers} == {computes_in}
    assert all(layer.weight.quant_state.nested for layer in layers)
    assert planned.model.get_base_model().lm_head.weight.dtype == torch.float32  # as in the checkpoint


def test_a_classifiers_head_is_trained_whole_on_codes(settings, tmp_path, tokenizer):
    torch.manual_seed(0)
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320}
    BertModel(BertConfig(**small, pad_token_id=1)).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    rows = [{"text": f"{a} {b} over", "label": b} for a in WORDS for b in WORDS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = {"model_name_or_path": str(tmp_path / "bert"), "task_type": "SEQ_CLS", "quantization": "nf4", "max_steps": 12}
    result = bonetune.train(settings | told)
    assert result.last_loss < result.first_loss
    head = {name: t for name, t in load_file(tmp_path / "run" / "adapter_model.safetensors").items() if "classifier" in name}
    assert {tuple(t.shape) for t in head.values()} == {(6, 64), (6,)}
    assert all(t.is_floating_point() for t in head.values())
    result = bonetune.merge(str(tmp_path / "run"), str(tmp_path / "merged"))
    assert result.certificate.holds
    data = settings["dataset_name"]
    scores = [bonetune.evaluate(str(tmp_path / n), ["classification"], data=data)[0].score for n in ("run", "merged")]
    assert scores[0] == pytest.approx(scores[1], abs=0.03)  # one of 36, by rounding
