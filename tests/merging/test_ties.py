"""Embeddings and heads that are one tensor, or are said to be."""

import pytest
import torch
from adapted_models import config, logits
from conftest import llama
from merges import change_json, save_adapter, stored
from transformers import AutoModelForCausalLM

import bonetune
from bonetune.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:.*tied.*", "ignore:.*save_embedding_layers.*", "ignore:.*tie_word_embeddings.*")


def test_rows_of_tokens_beside_an_adapted_head_are_refused(tmp_path, tokenizer):
    """PEFT replaces the rows of both, and adapts one of them."""
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    settings = config("bone", target_modules=["q_proj", "lm_head"], trainable_token_indices=[3, 4])
    save_adapter(tmp_path / "base", tmp_path / "adapter", settings)
    with pytest.raises(InputError, match=r"one tensor in the base model, of which rows are trained .*Use the adapter unmerged"):
        bonetune.merge(str(tmp_path / "adapter"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_head_that_is_said_to_be_tied_and_is_stored_otherwise(tmp_path, tokenizer, target):
    """transformers loads both, so they are two."""
    llama(tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    change_json(tmp_path / "base" / "config.json", tie_word_embeddings=True)
    adapted = save_adapter(tmp_path / "base", tmp_path / "adapter", config("bone", target_modules=["q_proj", target]))
    said = logits(adapted)
    with pytest.raises(InputError, match=r"because .* are one tensor by the base model's config.json, and differ"):
        bonetune.merge(str(tmp_path / "adapter"), str(tmp_path / "layers"), certify="layers")
    result = bonetune.merge(str(tmp_path / "adapter"), str(tmp_path / "out"))
    assert result.certificate.holds
    assert "differ in its files" in result.in_memory
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), said, rtol=1e-4, atol=1e-4)


def test_such_a_head_that_is_not_adapted_stays(tmp_path, tokenizer):
    llama(tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    change_json(tmp_path / "base" / "config.json", tie_word_embeddings=True)
    save_adapter(tmp_path / "base", tmp_path / "adapter", config("bone", target_modules=["q_proj"]))
    assert bonetune.merge(str(tmp_path / "adapter"), str(tmp_path / "out"), certify="layers").certificate.holds
    before, after = stored(tmp_path / "base"), stored(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in ("lm_head.weight", "model.embed_tokens.weight"))
