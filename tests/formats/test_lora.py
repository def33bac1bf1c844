"""LoRA made of adapters of this family, with PEFT's LoRA layers as the oracle."""

import json
from pathlib import Path

import pytest
import torch
from adapted_models import config, logits
from conftest import llama
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MixtralConfig,
    MixtralForCausalLM,
)

import bonetune
from bonetune import BoneLayer
from bonetune.formats import fit, lora, read_adapter


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    llama(attention_bias=True).save_pretrained(folder)
    return folder


def save(model, settings, folder):
    torch.manual_seed(1)
    adapted = get_peft_model(model, settings).eval()
    adapted.save_pretrained(folder)
    return adapted


@pytest.mark.parametrize("variant", ["bone", "mini", "bat-row"])
@pytest.mark.parametrize("targets", [["c_attn", "c_fc"], ["wte", "c_proj"]])
def test_conv1d_and_embeddings(tmp_path, variant, targets):
    torch.manual_seed(0)
    shape = {"n_embd": 24, "n_layer": 2, "n_head": 2, "vocab_size": 336, "n_positions": 32, "initializer_range": 0.2}
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path / "base")
    adapted = save(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config(variant, target_modules=targets), tmp_path / "a"
    )
    bonetune.convert(str(tmp_path / "a"), str(tmp_path / "lora"), to="lora", rank=336 if variant == "bat-row" else None)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "lora").eval()
    with adapted.disable_adapter():
        assert (logits(adapted) - logits(model)).abs().max() > 0.05
    torch.testing.assert_close(logits(model), logits(adapted), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["bone", "bat-left"])
def test_ranks_by_layer_travel(tmp_path, base, variant):
    settings = config(
        variant, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 8, "layers.1.self_attn.q_proj": 2}
    )
    adapted = save(AutoModelForCausalLM.from_pretrained(base), settings, tmp_path / "a")
    result = bonetune.convert(str(tmp_path / "a"), str(tmp_path / "lora"), to="lora", base=str(base), tolerance=1.0)
    ranks = {name: written.rank for name, written in result.layers.items()}
    assert ranks["model.layers.0.mlp.up_proj"] == 8
    assert ranks["model.layers.1.self_attn.q_proj"] == 2
    assert ranks["model.layers.0.self_attn.q_proj"] == 4
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora").eval()
    if variant == "bone":
        torch.testing.assert_close(logits(model), logits(adapted), rtol=1e-4, atol=1e-5)
    for name, layer in adapted.named_modules():
        if isinstance(layer, BoneLayer):
            wanted = layer.get_delta_weight("default")
            got = model.get_submodule(name).get_delta_weight("default")
            assert torch.linalg.matrix_rank(got) <= ranks[name.removeprefix("base_model.model.")]
            if variant == "bone":
                torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("rank", [1, 3, 8, 32])
@pytest.mark.parametrize("target", ["up_proj", "down_proj"])  # taller, and wider
def test_truncation_is_the_best_there_is_and_its_error_is_reported(tmp_path, base, rank, target):
    adapted = save(AutoModelForCausalLM.from_pretrained(base), config("bat", target_modules=[target]), tmp_path / "a")
    fitted = fit(read_adapter(tmp_path / "a"), str(base))
    for name in fitted:
        delta = adapted.base_model.model.get_submodule(name).get_delta_weight("default").double()
        found = lora.factors(fitted, name, rank)
        values = torch.linalg.svdvals(delta)
        best = float(values[rank:].square().sum().sqrt() / values.square().sum().sqrt())
        assert found.rank == rank
        assert found.error == pytest.approx(best, abs=1e-6)
        got = float((delta - found.B.double() @ found.A.double()).norm() / delta.norm())
        assert got == pytest.approx(best, abs=1e-6)
        curve = found.error_by_rank
        assert list(curve) == [1, 2, 4, 8, 16, 32]
        for k, error in curve.items():
            assert error == pytest.approx(float(values[k:].square().sum().sqrt() / values.norm()), abs=1e-6)


@pytest.mark.parametrize("target", ["up_proj", "down_proj"])
def test_large_weights_are_truncated_as_well(tmp_path, base, target, monkeypatch):
    save(AutoModelForCausalLM.from_pretrained(base), config("bat-row", target_modules=[target]), tmp_path / "a")
    fitted = fit(read_adapter(tmp_path / "a"), str(base))
    exact = {name: lora.factors(fitted, name, 8) for name in fitted}
    monkeypatch.setattr(lora, "_MOST_EXACT", 16)
    monkeypatch.setattr(lora, "_OVERSAMPLED", 4)
    for name in fitted:
        found = lora.factors(fitted, name, 8)
        assert found.error == pytest.approx(exact[name].error, rel=0.02)
        assert list(found.error_by_rank) == [1, 2, 4, 8]
        assert found.error_by_rank[8] == pytest.approx(found.error, rel=0.02)


def test_an_untrained_adapter_becomes_a_lora_of_nought(tmp_path, base):
    settings = config("bat", target_modules=["up_proj"], init_weights=True)
    save(AutoModelForCausalLM.from_pretrained(base), settings, tmp_path / "a")
    result = bonetune.convert(str(tmp_path / "a"), str(tmp_path / "lora"), to="lora", base=str(base))
    assert result.certificate.holds
    assert all(not pair.B.any() for pair in lora.read_factors(tmp_path / "lora")[0].values())


def test_the_report_has_the_errors(tmp_path, base):
    save(AutoModelForCausalLM.from_pretrained(base), config("bat-free", target_modules=["q_proj"]), tmp_path / "a")
    result = bonetune.convert(str(tmp_path / "a"), str(tmp_path / "lora"), to="lora", base=str(base), rank=6, tolerance=1.0)
    report = json.loads((tmp_path / "lora" / "conversion.json").read_text())
    for name, written in report["layers"].items():
        assert written["rank"] == 6
        assert list(written["error_by_rank"]) == ["1", "2", "4", "8", "16", "32"]
        # the certificate measured it on random inputs, the curve is exact
        assert written["error_by_rank"]["8"] < written["error"] < written["error_by_rank"]["4"]
        # the certificate measured it on random inputs, too
        assert written["error"] <= result.certificate.errors[name] < 1.5 * written["error"]
    assert report["certificate"]["largest_error"] == max(result.certificate.errors.values())


def test_biases_heads_and_trained_tokens_travel(tmp_path, base):
    settings = config(target_modules=["q_proj"], bias="bone_only", modules_to_save=["lm_head"])
    adapted = save(AutoModelForCausalLM.from_pretrained(base), settings, tmp_path / "a")
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "bone_block" not in name:
                parameter.add_(torch.randn_like(parameter) / 4)
    adapted.save_pretrained(tmp_path / "a")
    result = bonetune.convert(str(tmp_path / "a"), str(tmp_path / "lora"), to="lora", base=str(base))
    assert set(result.whole) >= {"lm_head.weight", "model.layers.0.self_attn.q_proj.bias"}
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(model), logits(adapted), rtol=1e-4, atol=1e-5)
    back = bonetune.convert(str(tmp_path / "lora"), str(tmp_path / "back"), to="peft-bone")
    assert back.certificate.holds
    first, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("a", "back"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_trained_tokens_travel(tmp_path, base):
    settings = config(target_modules=["q_proj"], trainable_token_indices=[5, 7])
    adapted = save(AutoModelForCausalLM.from_pretrained(base), settings, tmp_path / "a")
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "a")
    bonetune.convert(str(tmp_path / "a"), str(tmp_path / "lora"), to="lora", base=str(base))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(model), logits(adapted), rtol=1e-4, atol=1e-5)


def test_a_classifier(tmp_path):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 320}
    model = AutoModelForSequenceClassification.from_config(LlamaConfig(**shape, num_labels=3, pad_token_id=1))
    model.save_pretrained(tmp_path / "base")
    settings = config(target_modules=["q_proj"], task_type="SEQ_CLS")
    adapted = save(AutoModelForSequenceClassification.from_pretrained(tmp_path / "base"), settings, tmp_path / "a")
    result = bonetune.convert(str(tmp_path / "a"), str(tmp_path / "lora"), to="lora")
    assert result.whole == ("score.weight",)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(plain, tmp_path / "lora").eval()), logits(adapted))


def test_alpha_other_than_rank_is_read(tmp_path, base):
    adapted = save(AutoModelForCausalLM.from_pretrained(base), config(target_modules=["q_proj"]), tmp_path / "a")
    bonetune.convert(str(tmp_path / "a"), str(tmp_path / "lora"), to="lora", base=str(base))
    file = tmp_path / "lora" / "adapter_config.json"
    content = json.loads(file.read_text())
    content["lora_alpha"] = 8
    file.write_text(json.dumps(content))
    state = read_adapter(tmp_path / "lora")
    for name, tensor in state.tensors.items():
        torch.testing.assert_close(tensor, 2 * adapted.base_model.model.get_submodule(name).bone_block["default"].data)


def test_auto_classes_load_it(tmp_path, base):
    save(AutoModelForCausalLM.from_pretrained(base), config(target_modules=["q_proj"], task_type="CAUSAL_LM"), tmp_path / "a")
    bonetune.convert(str(tmp_path / "a"), str(tmp_path / "lora"), to="lora")
    assert AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora").peft_config["default"].peft_type == "LORA"


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"use_dora": True}, "has use_dora=True: its update is not B @ A alone"),
        ({"r": 0}, "no rank and alpha"),
        ({"rank_pattern": 3}, "no rank and alpha"),
    ],
)
def test_other_loras_are_refused(tmp_path, base, changes, fault):
    save(AutoModelForCausalLM.from_pretrained(base), config(target_modules=["q_proj"]), tmp_path / "a")
    bonetune.convert(str(tmp_path / "a"), str(tmp_path / "lora"), to="lora", base=str(base))
    file = tmp_path / "lora" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(bonetune.AdapterFileError, match=fault):
        read_adapter(tmp_path / "lora")


def test_half_a_pair_is_named(tmp_path, base):
    save(AutoModelForCausalLM.from_pretrained(base), config(target_modules=["q_proj"]), tmp_path / "a")
    bonetune.convert(str(tmp_path / "a"), str(tmp_path / "lora"), to="lora", base=str(base))
    file: Path = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    save_file(tensors, file)
    with pytest.raises(bonetune.AdapterFileError, match=r"only lora_A of the two factors of model\.layers\.0"):
        read_adapter(tmp_path / "lora")


def test_experts_do_not_become_lora(tmp_path):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
    MixtralForCausalLM(MixtralConfig(**shape, num_key_value_heads=2, num_local_experts=3)).save_pretrained(tmp_path / "base")
    settings = config(target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    save(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), settings, tmp_path / "a")
    with pytest.raises(bonetune.InputError, match="experts does not become LoRA"):
        bonetune.convert(str(tmp_path / "a"), str(tmp_path / "lora"), to="lora")
    assert {item.name for item in tmp_path.iterdir()} == {"a", "base"}
