"""What adapter files hold, which are accepted, and how others are refused."""

import json

import pytest
import torch
from adapted_models import IDS, adapted, logits
from conftest import llama
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from bonetune import VARIANTS, AdapterFileError, BoneConfig, BoneLayer

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def edit(folder, change_tensors=None, **config):
    content = json.loads((folder / CONFIG).read_text())
    for key, value in config.items():
        if value is None:
            del content[key]
        else:
            content[key] = value
    (folder / CONFIG).write_text(json.dumps(content))
    if change_tensors is not None:
        tensors = load_file(folder / WEIGHTS)
        change_tensors(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_saved_and_loaded_adapters_say_the_same(tmp_path, variant, low_cpu_mem_usage):
    model = adapted(variant, llama())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), logits(model))
    assert not any(p.requires_grad for p in loaded.parameters())


def test_tensor_names_are_those_of_peft_0_18(tmp_path):
    adapted("bat", llama(), target_modules=["q_proj"], layers_to_transform=[0]).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    assert {k: tuple(v.shape) for k, v in tensors.items()} == {
        "base_model.model.model.layers.0.self_attn.q_proj.bone_block": (8, 4, 4)
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_loaded_adapter_trains_on(tmp_path, variant):
    adapted(variant, llama()).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "bone_block" in n)


def test_auto_peft_model(tmp_path):
    base = tmp_path / "base"
    llama().save_pretrained(base)
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    settings = BoneConfig(r=4, variant="bat-left", init_weights=False, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), logits(model.eval()))


def test_a_second_adapter_of_another_variant_is_loaded_beside_the_first(tmp_path):
    first, second = adapted("bat-row", llama()), adapted("mini", llama())
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    model = PeftModel.from_pretrained(llama(), tmp_path / "first", adapter_name="first")
    model.load_adapter(tmp_path / "second", adapter_name="second")
    for name, expected in (("second", second), ("first", first)):
        model.set_adapter(name)
        assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_dict_functions(variant):
    model, other = adapted(variant, llama()), adapted(variant, llama(), init_weights=True)
    state = get_peft_model_state_dict(model)
    assert all(name.endswith(".bone_block") for name in state)
    set_peft_model_state_dict(other, state)
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_files_of_november_2024_are_bat(tmp_path, low_cpu_mem_usage):
    """PEFT's development version wrote `init_weights: true` with three-dimensional blocks."""
    model = adapted("bat", llama())
    model.save_pretrained(tmp_path)
    edit(tmp_path, init_weights=True, variant=None)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.peft_config["default"].variant == "bat"
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / CONFIG).read_text())["init_weights"] == "bat"


@pytest.mark.parametrize("variant", ["bone", "bat"])
def test_files_of_peft_0_18_have_no_variant_key(tmp_path, variant):
    model = adapted(variant, llama())
    model.save_pretrained(tmp_path)
    edit(tmp_path, variant=None)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model))


def test_a_named_variant_is_never_second_guessed(tmp_path):
    adapted("bat", llama()).save_pretrained(tmp_path)
    edit(tmp_path, init_weights=True, variant="bone")
    with pytest.raises(AdapterFileError, match=r"bone needs \(4, 32\)"):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_everything_wrong_with_a_file_is_named_at_once(tmp_path):
    adapted("bat", llama()).save_pretrained(tmp_path)
    base = "base_model.model.model.layers"

    def spoil(tensors):
        del tensors[f"{base}.0.self_attn.q_proj.bone_block"]
        tensors[f"{base}.7.mlp.up_proj.bone_block"] = torch.zeros(2, 2)
        tensors[f"{base}.1.mlp.up_proj.bone_block"] = torch.zeros(3, 4, 4)
        tensors[f"{base}.0.mlp.up_proj.lora_A.weight"] = torch.zeros(3, 4)

    edit(tmp_path, spoil)
    with pytest.raises(AdapterFileError) as caught:
        PeftModel.from_pretrained(llama(), tmp_path)
    message = str(caught.value)
    assert f"{base}.0.self_attn.q_proj.bone_block.default is missing" in message
    assert f"{base}.0.mlp.up_proj.lora_A.weight is not expected" in message
    assert f"{base}.7.mlp.up_proj.bone_block is not expected" in message
    assert f"{base}.1.mlp.up_proj.bone_block.default has shape (3, 4, 4), bat needs (12, 4, 4)" in message


def test_papers_advanced_usage(tmp_path, model_folder):
    """The papers' README: train, save the adapter, unload, save base and tokenizer into the same folder, reload both."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), BoneConfig(r=8, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = logits(model.eval())
    model.save_pretrained(tmp_path)
    base = model.unload()
    base.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    again = AutoModelForCausalLM.from_pretrained(tmp_path)  # finds the adapter beside the base and puts it on
    assert any(isinstance(m, BoneLayer) for m in again.modules())
    torch.testing.assert_close(logits(again), expected)
    from transformers import LlamaForCausalLM

    bare = llama()
    bare.load_state_dict(base.state_dict())
    assert isinstance(bare, LlamaForCausalLM)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(bare, tmp_path)), expected)
    assert AutoTokenizer.from_pretrained(tmp_path)("one").input_ids == tokenizer("one").input_ids
