import json

import pytest
import torch
from conftest import llama
from transformers import GenerationConfig

import bonetune
from bonetune.errors import InputError
from bonetune.evaluation import generate
from bonetune.models import Loaded

PROMPTS = ["the quick brown fox", "a", "what is one plus two? three", "the lazy dog jumps over"]


def greedy(model, tokenizer, prompt, count):
    """One token at a time, no cache, no padding."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    for _ in range(count):
        with torch.no_grad():
            following = model(ids).logits[0, -1].argmax()
        if following == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, following.view(1, 1)], 1)
    return tokenizer.decode(ids[0, len(tokenizer(prompt).input_ids) :], skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batched_generation_is_greedy_decoding_of_each_prompt(tokenizer, batch_size):
    model, done = llama(), []
    answers = generate(model, tokenizer, PROMPTS, max_new_tokens=6, batch_size=batch_size, on_batch=done.append)
    assert answers == [greedy(model, tokenizer, prompt, 6) for prompt in PROMPTS]
    assert sum(done) == len(PROMPTS)


def test_greedy_is_greedy_whatever_the_model_asks_for(tokenizer):
    """Penalties, beams and sampling stand in many models' generation_config; so does another end of text."""
    model = llama()
    expected = generate(model, tokenizer, PROMPTS, max_new_tokens=6)
    own = GenerationConfig(
        do_sample=True, temperature=5.0, num_beams=3, num_return_sequences=2, repetition_penalty=3.0, no_repeat_ngram_size=1,
        return_dict_in_generate=True, eos_token_id=7,
    )  # fmt: skip
    model.generation_config = own
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=6) == expected
    assert model.generation_config is own


def test_an_answer_ends_where_training_taught_it_to(tokenizer):
    model = llama()
    model.generation_config.eos_token_id = 7
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every logit is 0 ...
        hidden = model.model(tokenizer("a", return_tensors="pt").input_ids)[0][0, -1]
        model.lm_head.weight[tokenizer.eos_token_id] = 1e3 * hidden  # ... but that of the tokenizer's end of text
    assert generate(model, tokenizer, ["a"], max_new_tokens=6) == [""]


@pytest.fixture
def data(tmp_path, tokenizer):
    """Rows of which the model answers the first two as expected and the others not."""
    model = llama()
    rows = [{"prompt": p, "completion": greedy(model, tokenizer, p, 6) if i < 2 else "?"} for i, p in enumerate(PROMPTS)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_exact_match_with_records(data, model_folder, tmp_path):
    (result,) = bonetune.evaluate(
        str(model_folder), ["exact-match"], data=str(data), max_new_tokens=6, output_dir=str(tmp_path / "o")
    )
    assert [record["correct"] for record in result.records] == [True, True, False, False]
    assert (result.score, result.items) == (0.5, 4)
    assert result.interval[0] < 0.5 < result.interval[1]
    assert len((tmp_path / "o" / "exact-match.jsonl").read_text().splitlines()) == 4
    (scores,) = json.loads((tmp_path / "o" / "scores.json").read_text())
    assert scores == {"task": "exact-match", "score": 0.5, "interval": list(result.interval), "items": 4}


def test_loss_is_the_mean_over_supervised_tokens(data, tokenizer):
    loaded = Loaded(llama(), tokenizer, "m")
    (result,) = bonetune.evaluate(loaded, ["loss"], data=str(data))
    total, tokens = 0.0, 0
    for line in data.read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"]).input_ids
        ids = torch.tensor([prompt + tokenizer(row["completion"]).input_ids + [tokenizer.eos_token_id]])
        with torch.no_grad():
            logp = loaded.model(ids).logits.double().log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])
        total -= logp[len(prompt) - 1 :].sum().item()
        tokens += ids.shape[1] - len(prompt)
    assert result.score == pytest.approx(total / tokens, rel=1e-5)


def test_limit(data, model_folder):
    (result,) = bonetune.evaluate(str(model_folder), ["loss"], data=str(data), limit=2)
    assert result.items == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": ["exact"]}, "Unknown task 'exact': choose from exact-match, loss"),
        ({"tasks": []}, "Unknown task"),
        ({"limit": 0}, "limit should be a positive number"),
        ({"model": "/no/such/model"}, "Model folder /no/such/model does not exist"),
        ({"base": "x"}, "is not an adapter folder"),
    ],
)
def test_bad_input(data, model_folder, arguments, message):
    settings = {"model": str(model_folder), "tasks": ["loss"], "data": str(data)} | arguments
    with pytest.raises(InputError, match=message):
        bonetune.evaluate(**settings)


def test_an_adapter_is_examined_with_the_prompt_it_was_trained_with(tmp_path, model_folder):
    (tmp_path / "rows.jsonl").write_text('{"q": "one", "a": "two"}\n' * 8)
    settings = {
        "model_name_or_path": str(model_folder),
        "dataset_name": str(tmp_path / "rows.jsonl"),
        "output_dir": str(tmp_path / "run"),
        "dataset_field": ["q", "a"],
        "prompt_template": "Q: {instruction} A:",
        "r": 4,
    }
    bonetune.train(settings)
    (result,) = bonetune.evaluate(str(tmp_path / "run"), ["exact-match"], data=settings["dataset_name"], max_new_tokens=1)
    assert result.records[0]["prompt"] == "Q: one A:"
    other = {"data": settings["dataset_name"], "max_new_tokens": 1, "prompt_template": "{instruction}!"}
    (result,) = bonetune.evaluate(str(tmp_path / "run"), ["exact-match"], **other)
    assert result.records[0]["prompt"] == "one!"


def test_a_place_that_cannot_be_written_is_found_before_the_work(data, model_folder):
    with pytest.raises(InputError, match="is a file"):
        bonetune.evaluate(str(model_folder), ["loss"], data=str(data), output_dir=str(data / "out"))
