"""The settings of generation that a merged model has from its base model's config.json."""

import json

import pytest
import torch
from adapted_models import config
from conftest import llama
from merges import change_json
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

import bonetune

IDS = torch.tensor([[5, 6, 7]])


@pytest.fixture
def ends_elsewhere(tokenizer):
    """A tokenizer whose end is not the base models'."""
    tokenizer.eos_token = tokenizer.bos_token
    return tokenizer


def merge(model, tmp_path, tokenizer, said=(), **settings):
    """The generation settings of a merged model whose base has none in a file of their own."""
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").unlink()
    change_json(tmp_path / "base" / "config.json", **dict(said))
    get_peft_model(model, config("bone", **settings)).save_pretrained(tmp_path / "adapter")
    change_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "base"))
    tokenizer.save_pretrained(tmp_path / "adapter")
    bonetune.merge(str(tmp_path / "adapter"), str(tmp_path / "merged"), certify="layers")
    return json.loads((tmp_path / "merged" / "generation_config.json").read_text())


def test_t5_begins_as_before_and_ends_where_the_adapter_does(tmp_path, ends_elsewhere):
    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=2, pad_token_id=1, eos_token_id=1)).eval()
    options = {"task_type": "SEQ_2_SEQ_LM", "target_modules": ["q", "wo"]}
    settings = merge(model, tmp_path, ends_elsewhere, **options)
    assert (settings["decoder_start_token_id"], settings["pad_token_id"]) == (2, 1)
    assert settings["eos_token_id"] == sorted({1, ends_elsewhere.eos_token_id})
    merged = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged")
    answer = merged.generate(IDS, max_new_tokens=3)
    assert answer[0, 0] == 2
    assert merged.generation_config.eos_token_id == settings["eos_token_id"]


def test_of_an_old_configuration(tmp_path, ends_elsewhere):
    model = llama(bos_token_id=3, eos_token_id=7, pad_token_id=4)
    sampling = {"do_sample": True, "temperature": 0.6, "top_k": 7}
    settings = merge(model, tmp_path, ends_elsewhere, sampling)
    assert settings.items() >= sampling.items()
    assert (settings["bos_token_id"], settings["pad_token_id"]) == (3, 4)
    ends = sorted({7, ends_elsewhere.eos_token_id})
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    merged.generate(IDS, max_new_tokens=2, do_sample=False)
    assert merged.generation_config.eos_token_id == settings["eos_token_id"] == ends
