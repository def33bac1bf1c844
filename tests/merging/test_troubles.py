"""What goes wrong with adapters and merges elsewhere, shown first, and that it does not here: rows of docs/troubles.md."""

import json

import pytest
import torch
import usual_tools
from adapted_models import IDS, config, logits
from conftest import llama
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import bonetune
from bonetune import BoneLayer
from bonetune.errors import AdapterFileError
from bonetune.models import load_model


def distance(a, b):
    """Root mean square of the difference, over that of `b`."""
    return ((a - b).double().square().mean() / b.double().square().mean()).sqrt().item()


def weights(model):
    """The frozen ones."""
    return {name: t.clone() for name, t in model.state_dict().items() if "lora_" not in name and "bone_block" not in name}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_of_a_quantized_model_is_merged_into_another_model(tmp_path, tokenizer, dtype):
    folder = tmp_path / "base"
    llama(hidden_size=64, intermediate_size=128).to(dtype).save_pretrained(folder)  # blocks of nf4 are of 64
    tokenizer.save_pretrained(folder)
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantized)
    trained = usual_tools.lora(base, trained=True).eval()
    trained.save_pretrained(tmp_path / "lora")
    usual = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "lora")
    assert distance(logits(usual.merge_and_unload()).float(), logits(trained).float()) > 0.1

    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "the quick", "completion": " fox"}) + "\n")
    settings = {
        "model_name_or_path": str(folder),
        "dataset_name": str(tmp_path / "rows.jsonl"),
        "output_dir": str(tmp_path / "run"),
        "quantization": "nf4",
        "r": 4,
        "learning_rate": 2e-3,
        "max_steps": 2,
        "rehearsal": False,
        "sample_prompts": 0,
    }
    bonetune.train(settings)
    ours = load_model(str(tmp_path / "run"))
    assert any(getattr(parameter, "quant_state", None) is not None for parameter in ours.model.parameters())
    said = logits(ours.model).float()
    result = bonetune.merge(str(tmp_path / "run"), str(tmp_path / "merged"))
    assert distance(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")).float(), said) < 0.03
    assert result.into == "trained"
    assert result.certificate.holds
    assert result.other is not None
    assert not result.other.holds


def test_merging_and_unmerging_wears_bfloat16_weights_out(tmp_path):
    usual = usual_tools.lora(llama().bfloat16(), trained=True)
    torch.manual_seed(1)
    ours = get_peft_model(llama().bfloat16(), config("bone"))
    for model, kept in ((usual, False), (ours, True)):
        before = weights(model)
        for _ in range(5):
            model.merge_adapter()
            model.unmerge_adapter()
        assert same(weights(model), before) is kept


def test_two_updates_are_rounded_one_after_the_other():
    models = usual_tools.lora(llama().bfloat16(), trained=True), get_peft_model(llama().bfloat16(), config("bone"))
    models[0].add_adapter("other", LoraConfig(**usual_tools.LORA))
    usual_tools.update(models[0], "other")
    models[1].add_adapter("other", config("bone"))
    before = llama().bfloat16().model.layers[0].mlp.up_proj.weight.float()
    for model, rounds_once in zip(models, (False, True), strict=True):
        layer = model.base_model.model.model.layers[0].mlp.up_proj
        if rounds_once:
            blocks = [layer.bone_block[name].detach() for name in ("default", "other")]  # (r, out): W[o, b*r+j] + D[j, o]
            updates = [block.T.repeat(1, layer.in_features // len(block)) for block in blocks]
        else:
            updates = [layer.get_delta_weight(name).detach() for name in ("default", "other")]
        assert all(delta.dtype == torch.float32 for delta in updates)
        merged = model.merge_and_unload(adapter_names=["default", "other"]).model.layers[0].mlp.up_proj.weight
        assert torch.equal(merged, (before + sum(updates)).bfloat16()) is rounds_once


def test_tensors_that_are_missing_from_an_adapter(tmp_path):
    usual = usual_tools.lora(trained=True).eval()
    ours = get_peft_model(llama(), config("bone")).eval()
    for model, name in ((usual, "lora"), (ours, "bone")):
        model.save_pretrained(tmp_path / name)
        file = tmp_path / name / "adapter_model.safetensors"
        tensors = load_file(file)
        kept = {key: tensor for key, tensor in tensors.items() if "layers.1." not in key}
        assert 0 < len(kept) < len(tensors)
        save_file(kept, file, {"format": "pt"})
    with pytest.warns(UserWarning, match="missing adapter keys"):
        loaded = PeftModel.from_pretrained(llama(), tmp_path / "lora").eval()
    assert distance(logits(loaded), logits(usual)) > 0.01
    with pytest.raises(AdapterFileError, match=r"layers\.1\.self_attn\.q_proj\.bone_block.* is missing; .* is missing"):
        PeftModel.from_pretrained(llama(), tmp_path / "bone")


@pytest.mark.filterwarnings("default")
def test_a_merged_head_changes_the_embeddings_it_is_tied_to(tmp_path, tokenizer):
    base = llama(tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    targets = ["q_proj", "lm_head"]

    def tied():
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base")

    usual = usual_tools.lora(tied(), trained=True, target_modules=targets).eval()
    said = logits(usual)
    usual.merge_and_unload().save_pretrained(tmp_path / "usual")
    assert distance(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "usual")), said) > 0.01

    ours = get_peft_model(tied(), config("bone", target_modules=targets)).eval()
    ours.save_pretrained(tmp_path / "adapter")
    assert sum(isinstance(module, BoneLayer) for module in ours.modules()) == 3
    said = logits(ours)
    result = bonetune.merge(str(tmp_path / "adapter"), str(tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), said, rtol=1e-4, atol=1e-4)
    assert torch.equal(merged.get_input_embeddings()(IDS), base.get_input_embeddings()(IDS))
    assert result.certificate.holds
