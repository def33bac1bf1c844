import json
import shutil

import pytest
import torch
from adapted_models import IDS, config
from merges import save_adapter
from peft import LoraConfig
from safetensors.torch import load, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import bonetune
from bonetune import VARIANTS, BoneLayer
from bonetune.errors import AdapterFileError, InputError


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_merged_model_is_the_adapted_one_and_says_so(tmp_path, model_folder, variant):
    adapted = save_adapter(model_folder, tmp_path / "adapter", config(variant))
    result = bonetune.merge(str(tmp_path / "adapter"), str(tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not any(isinstance(m, BoneLayer) for m in merged.modules())
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    assert result.certificate.holds
    assert result.certificate.greedy_agreement == 1
    assert result.certificate.largest_logit_difference < 1e-3
    assert result.in_memory is None
    content = json.loads((tmp_path / "merged" / "certificate.json").read_text())
    assert content.items() >= result.certificate.to_dict().items()
    del content["files"]  # of the merged model
    assert json.loads((tmp_path / "adapter" / "certificate.json").read_text()) == content
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_scale_multiplies_the_update(tmp_path, model_folder):
    adapted = save_adapter(model_folder, tmp_path / "adapter", config("bat"))
    bonetune.merge(str(tmp_path / "adapter"), str(tmp_path / "merged"), scale=0.5)
    for layer in (m for m in adapted.modules() if isinstance(m, BoneLayer)):
        layer.bone_block["default"].data.mul_(0.5)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-4, atol=1e-4)


def test_dtype(tmp_path, model_folder):
    save_adapter(model_folder, tmp_path / "adapter", config("bone"))
    result = bonetune.merge(str(tmp_path / "adapter"), str(tmp_path / "merged"), dtype="bfloat16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16
    assert result.certificate.dtype == "bfloat16"
    assert result.certificate.holds


def test_prompts_of_the_training_run_are_the_witnesses(tmp_path, model_folder):
    save_adapter(model_folder, tmp_path / "adapter", config("bone"))
    (tmp_path / "adapter" / "prompts.jsonl").write_text('"the quick"\n"brown fox"\n"over"\n')
    assert bonetune.merge(str(tmp_path / "adapter"), str(tmp_path / "merged")).certificate.prompts == 3


def test_rounded_once_to_the_dtype_asked_for(tmp_path, model_folder):
    adapted = save_adapter(model_folder, tmp_path / "adapter", config("bat"))
    bonetune.merge(str(tmp_path / "adapter"), str(tmp_path / "merged"), dtype="bfloat16")
    exact = adapted.merge_and_unload().state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict().items():
        assert torch.equal(tensor, exact[name].bfloat16()), name


def test_prompts_may_hold_any_character_and_junk_is_named(tmp_path, model_folder):
    save_adapter(model_folder, tmp_path / "adapter", config("bone"))
    prompts = tmp_path / "adapter" / "prompts.jsonl"
    prompts.write_text(json.dumps("a\u2028b\u0085", ensure_ascii=False) + '\n""\n', encoding="utf-8")
    assert bonetune.merge(str(tmp_path / "adapter"), str(tmp_path / "merged")).certificate.prompts == 1
    prompts.write_text("junk\nmore\n")
    with pytest.raises(InputError, match=r"prompts\.jsonl does not hold a text"):
        bonetune.merge(str(tmp_path / "adapter"), str(tmp_path / "again"))


def test_overwriting_replaces_a_merged_model_whole_and_nothing_else(tmp_path, model_folder):
    save_adapter(model_folder, tmp_path / "adapter", config("bone"))
    adapter, output = str(tmp_path / "adapter"), tmp_path / "merged"
    bonetune.merge(adapter, str(output))
    (output / "stale.bin").write_text("old")
    bonetune.merge(adapter, str(output), overwrite=True)
    assert not (output / "stale.bin").exists()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("merge")
    with pytest.raises(InputError, match="something else than a merged model"):
        bonetune.merge(adapter, str(tmp_path / "notes"), overwrite=True)


def test_the_merged_model_knows_where_its_answers_end(tmp_path, model_folder):
    save_adapter(model_folder, tmp_path / "adapter", config("bone"))
    base = tmp_path / "base"
    shutil.copytree(model_folder, base)
    settings = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": 7}))
    bonetune.merge(str(tmp_path / "adapter"), str(tmp_path / "merged"), base=str(base))
    assert json.loads((tmp_path / "merged" / "generation_config.json").read_text())["eos_token_id"] == [1, 7]


def test_bad_input(tmp_path, model_folder):
    save_adapter(model_folder, tmp_path / "adapter", config("bone"))
    adapter, output = str(tmp_path / "adapter"), str(tmp_path / "out")
    with pytest.raises(InputError, match="is not an adapter folder"):
        bonetune.merge(str(model_folder), output)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    with pytest.raises(InputError, match="already exists"):
        bonetune.merge(adapter, str(tmp_path / "taken"))
    with pytest.raises(InputError, match="scale should be a finite number"):
        bonetune.merge(adapter, output, scale=float("nan"))
    with pytest.raises(InputError, match="Unknown dtype 'int3'"):
        bonetune.merge(adapter, output, dtype="int3")
    with pytest.raises(InputError, match="certify should be auto, logits or layers, got 'yes'"):
        bonetune.merge(adapter, output, certify="yes")
    with pytest.raises(InputError, match="tolerance should be a number above 0"):
        bonetune.merge(adapter, output, tolerance=0.0)
    with pytest.raises(InputError, match="name at least one"):
        bonetune.merge([], output)
    with pytest.raises(InputError, match="named twice"):
        bonetune.merge([adapter, adapter], output)
    with pytest.raises(InputError, match="does not exist"):
        bonetune.merge(adapter, output, base="/no/such/model")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    for key, error, message in (
        ("base_model_name_or_path", InputError, "names no base model: pass --base"),
        ("peft_type", AdapterFileError, "has no peft_type"),
    ):
        changed = {k: v for k, v in settings.items() if k != key}
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(changed))
        with pytest.raises(error, match=message):
            bonetune.merge(adapter, output)
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings | {"peft_type": "FOO"}))
    with pytest.raises(AdapterFileError, match="PEFT knows no method 'FOO'"):
        bonetune.merge(adapter, output)
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for content, message in ((whole[:-8], "is not a whole safetensors file"), (None, "has a configuration but no weights")):
        weights.unlink() if content is None else weights.write_bytes(content)
        with pytest.raises(InputError, match=message):
            bonetune.merge(adapter, output)
    tensors = load(whole)
    next(iter(tensors.values()))[0] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(AdapterFileError, match="has values that are not finite"):
        bonetune.merge(adapter, output)
    (tmp_path / "adapter" / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterFileError, match=r"is not (a )?JSON"):
        bonetune.merge(adapter, output)
    assert not (tmp_path / "out").exists()


def test_other_methods_merge_too_but_have_no_scale(tmp_path, model_folder):
    save_adapter(model_folder, tmp_path / "adapter", LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    assert bonetune.merge(str(tmp_path / "adapter"), str(tmp_path / "merged")).certificate.holds
    with pytest.raises(InputError, match="--scale needs an adapter of the Bone family"):
        bonetune.merge(str(tmp_path / "adapter"), str(tmp_path / "other"), scale=0.5)
