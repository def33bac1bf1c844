"""What models say, compared."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bonetune.certificates import certify, witness


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_certificate_does_not_hold_for_another_model(tmp_path, model_folder, dtype):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype)
    said = witness(model, tokenizer, ["the quick brown", "what is one"])
    assert certify(model, said).holds
    assert certify(model, said).largest_logit_difference < 0.05
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(-1)
    other = certify(model, said)
    assert not other.holds
    assert "NOT equal" in str(other)
    assert other.mean_kl > 0


def test_nan_equals_nothing(model_folder):
    tokenizer, model = AutoTokenizer.from_pretrained(model_folder), AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    assert not certify(model, witness(model, tokenizer, ["a"])).holds


def test_a_tolerance_that_is_given_takes_the_place_of_the_stated_one(model_folder):
    tokenizer, model = AutoTokenizer.from_pretrained(model_folder), AutoModelForCausalLM.from_pretrained(model_folder)
    said = witness(model, tokenizer, ["the quick brown"])
    with torch.no_grad():
        model.model.norm.weight.mul_(1.001)
    strict, lax = certify(model, said), certify(model, said, 0.01)
    assert strict.error == lax.error
    assert (strict.holds, lax.holds) == (False, True)
    assert (strict.to_dict()["tolerance"], lax.to_dict()["tolerance"]) == (1e-4, 0.01)


def test_two_models_of_which_all_logits_are_zero_show_nothing(model_folder):
    tokenizer, model = AutoTokenizer.from_pretrained(model_folder), AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        model.model.norm.weight.zero_()
    certificate = certify(model, witness(model, tokenizer, ["the quick brown"]))
    assert (certificate.size, certificate.error, certificate.greedy_agreement) == (0, 0, 1)
    assert not certificate.holds
