import json
from dataclasses import replace

import pytest
import torch
import yaml
from conftest import llama
from transformers import GenerationConfig, LlamaForSequenceClassification

import bonetune
from bonetune.data import write_binidx
from bonetune.errors import InputError
from bonetune.models import Loaded, generate

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
    assert scores == result.summary() | {"interval": list(result.interval), "model": str(model_folder), "dtype": "auto"}
    assert scores["protocol"].startswith("exact-match: greedy, at most 6 new tokens; equal to the expected answer")


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
    assert result.interval[0] < result.score < result.interval[1]


def test_loss_of_token_ids_is_that_of_their_text(tmp_path, tokenizer):
    loaded = Loaded(llama(), tokenizer, "m")
    texts, ids = tmp_path / "texts.jsonl", tmp_path / "ids"
    texts.write_text("".join(json.dumps({"text": prompt}) + "\n" for prompt in PROMPTS))
    write_binidx(ids, [[*tokenizer(prompt).input_ids, tokenizer.eos_token_id] for prompt in PROMPTS])
    (expected,), (found,) = (bonetune.evaluate(loaded, ["loss"], data=str(data)) for data in (texts, ids))
    assert replace(found, protocol="") == replace(expected, protocol="")
    with pytest.raises(InputError, match="Rows of tokens have no question and answer"):
        bonetune.evaluate(loaded, ["exact-match"], data=str(ids))


def test_limit(data, model_folder):
    (result,) = bonetune.evaluate(str(model_folder), ["loss"], data=str(data), limit=2)
    assert result.items == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": ["exact"]}, "Unknown task 'exact': choose from exact-match, loss"),
        ({"tasks": []}, "Unknown task"),
        ({"dataset_format": "chatml"}, "Unknown dataset_format 'chatml': choose from auto, prompt-completion"),
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


def run_of(tmp_path, tokenizer, summary=None, task_type="CAUSAL_LM", **settings):
    """A model that says it has an adapter, beside which a run noted these settings."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    if summary is not None:
        (tmp_path / "summary.json").write_text(json.dumps(summary))
    if task_type == "CAUSAL_LM":
        return Loaded(llama(), tokenizer, "m", str(tmp_path))
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(llama().config).eval()
    return Loaded(model, tokenizer, "m", str(tmp_path), task_type)


def rows_file(tmp_path, *rows):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# A row that several formats fit, and what the model is given of it by each.
AMBIGUOUS = {"prompt": "one", "completion": "two", "instruction": "fox", "input": "dog", "output": "lazy", "q": "jumps"}
ALPACA = "T fox\n\n### Input:\ndog"


@pytest.mark.parametrize(
    ("settings", "summary", "told", "expected"),
    [
        ({}, None, {}, "one"),
        ({"dataset_format": "alpaca"}, None, {}, ALPACA),
        ({"dataset_format": "alpaca", "dataset_field": ["q", "output"]}, None, {}, "T jumps"),
        ({"dataset_format": "auto"}, {"row_format": {"kind": "instruction", "fields": ["q", "output"]}}, {}, "T jumps"),
        ({"dataset_format": "auto"}, {"row_format": {"kind": "messages", "fields": ["messages"]}}, {}, "one"),
        ({"dataset_format": "alpaca"}, {}, {"dataset_format": "auto"}, "one"),
        ({}, None, {"dataset_format": "alpaca"}, ALPACA),
        ({"dataset_format": "alpaca"}, None, {"dataset_field": ["q", "output"]}, "T jumps"),
    ],
)
def test_rows_are_read_as_in_the_adapters_training(tmp_path, tokenizer, settings, summary, told, expected):
    loaded = run_of(tmp_path, tokenizer, summary, prompt_template="T {instruction}", **settings)
    data = rows_file(tmp_path, AMBIGUOUS)
    (result,) = bonetune.evaluate(loaded, ["exact-match"], data=data, max_new_tokens=1, **told)
    assert result.records[0]["prompt"] == expected


LONG = {"prompt": "fox", "completion": "the quick brown fox jumps over the lazy dog " * 3}
SHORT = {"prompt": "fox", "completion": "one plus two"}


@pytest.mark.parametrize(
    ("truncation", "metrics", "scored"),
    [("right", {"truncated": 1.0}, [1, 2, 3]), ("left", {"truncated": 1.0}, [1, 2, 3]), ("drop", {"dropped": 1.0}, [1, 3])],
)
def test_long_rows_are_cut_as_in_training_and_counted(tmp_path, tokenizer, truncation, metrics, scored):
    loaded = run_of(tmp_path, tokenizer, truncation=truncation, max_length=12)
    data = rows_file(tmp_path, SHORT, LONG, SHORT)
    done = []
    (result,) = bonetune.evaluate(loaded, ["loss"], data=data, on_items=lambda task, n, total: done.append((n, total)))
    assert result.metrics == metrics
    assert [record["row"] for record in result.records] == scored
    assert max(record["supervised_tokens"] for record in result.records) <= 11
    assert done[-1] == (3, 3)


@pytest.mark.parametrize("settings", [{}, {"truncation": "error", "max_length": 12}, {"truncation": "drop", "max_length": 1}])
def test_rows_that_cannot_be_scored_are_one_clear_error(tmp_path, tokenizer, settings):
    loaded = run_of(tmp_path, tokenizer, **settings)
    data = rows_file(tmp_path, SHORT, LONG | {"completion": "fox dog " * 200})
    with pytest.raises(InputError, match=r"[12] of 2 rows are longer than the (128|1) tokens that .* take them out") as raised:
        bonetune.evaluate(loaded, ["loss"], data=data)
    assert "truncation" not in str(raised.value)


def test_a_row_longer_than_a_run_allowed_is_scored_whole_if_the_model_takes_it(tmp_path, tokenizer):
    loaded = run_of(tmp_path, tokenizer, truncation="error", max_length=12)
    (result,) = bonetune.evaluate(loaded, ["loss"], data=rows_file(tmp_path, LONG))
    assert result.records[0]["supervised_tokens"] == len(tokenizer(LONG["completion"]).input_ids) + 1


def test_a_classifier_sees_what_it_saw_in_training(tmp_path, tokenizer):
    texts = ["fox", "the quick brown fox jumps over the lazy dog " * 3]
    loaded = run_of(tmp_path, tokenizer, task_type="SEQ_CLS", truncation="right", max_length=8)
    seen = []
    loaded.model.register_forward_pre_hook(lambda m, a, inputs: seen.append(inputs["input_ids"].shape[1]), with_kwargs=True)
    data = rows_file(tmp_path, *({"text": text, "label": n} for n, text in enumerate(texts)))
    (result,) = bonetune.evaluate(loaded, ["classification"], data=data, batch_size=1)
    assert max(seen) == 8
    assert result.metrics["truncated"] == 1
    assert [record["row"] for record in result.records] == [1, 2]


def test_the_loss_is_right_for_a_head_that_looks_around(data, tokenizer):
    """Nothing but `check_loss` can tell that its logits cannot be made by chunks."""

    class Neighbours(type(llama())):
        def forward(self, **inputs):
            output = super().forward(**inputs)
            output.logits = output.logits + output.logits.cumsum(1)
            return output

    loaded = Loaded(llama(), tokenizer, "m")
    loaded.model.__class__ = Neighbours
    (result,) = bonetune.evaluate(loaded, ["loss"], data=str(data), limit=1)
    row = json.loads(data.read_text().splitlines()[0])
    prompt = tokenizer(row["prompt"]).input_ids
    ids = torch.tensor([prompt + tokenizer(row["completion"]).input_ids + [tokenizer.eos_token_id]])
    with torch.no_grad():
        logp = loaded.model(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])
    assert result.score == pytest.approx(-logp[len(prompt) - 1 :].mean().item(), rel=1e-4)
