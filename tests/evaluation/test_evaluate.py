import json
import math
import shutil
import sys
from dataclasses import replace
from importlib import import_module

import pytest
import torch
import yaml
from conftest import llama
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaForSequenceClassification

import bonetune
from bonetune import BoneConfig
from bonetune.data import write_binidx
from bonetune.errors import InputError
from bonetune.evaluation import Judge
from bonetune.models import Loaded, generate, load_tokenizer
from bonetune_cli.main import main

EVALUATE = import_module("bonetune.evaluation.evaluate")  # the function has its name
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
    assert scores == result.summary() | {"interval": list(result.interval), "model": str(model_folder), "dtype": "float32"}
    assert scores["protocol"].startswith("exact-match: greedy, at most 6 new tokens; equal to the expected answer")
    assert "; rows read as prompt-completion (prompt, completion); rows of rows.jsonl; bonetune " in scores["protocol"]


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
    assert "; rows read as instruction (q, a), prompt template 'Q: {instruction} A:'; rows of" in result.protocol
    other = {"data": settings["dataset_name"], "max_new_tokens": 1, "prompt_template": "{instruction}!"}
    (result,) = bonetune.evaluate(str(tmp_path / "run"), ["exact-match"], **other)
    assert result.records[0]["prompt"] == "one!"
    assert result.protocol.count("prompt template") == 1
    assert "prompt template '{instruction}!'" in result.protocol


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


@pytest.mark.parametrize(
    ("tasks", "option", "message"),
    [
        (["gsm8k:strict"], {"few_shot": "x"}, r"few_shot means nothing to gsm8k:strict: .* \(gsm8k:lm-eval, lm-eval:NAME\)"),
        (["gsm8k:strict"], {"dataset_format": "alpaca"}, "dataset_format means nothing to gsm8k:strict"),
        (["gsm8k:arena"], {"dataset_field": ["a", "b"]}, "dataset_field means nothing to gsm8k:arena"),
        (["perplexity"], {"prompt_template": "{instruction}"}, "prompt_template means nothing to perplexity"),
        (["perplexity", "loss"], {"few_shot": "x"}, "few_shot means nothing to perplexity, loss"),
        (["lm-eval:arc_easy"], {"prompt_template": "{instruction}"}, "prompt_template means nothing to lm-eval:arc_easy"),
        (["lm-eval:arc_easy"], {"dataset_field": ["a"]}, "dataset_field means nothing to lm-eval:arc_easy"),
        (["humaneval"], {"prompt_template": "{instruction}"}, "prompt_template means nothing to humaneval"),
        (["loss"], {"judge": Judge("http://x/v1", "m")}, r"judge means nothing to loss: .* \(mt-bench\)"),
    ],
)
def test_an_option_that_no_task_heeds_is_refused(tokenizer, tasks, option, message):
    with pytest.raises(InputError, match=message):
        bonetune.evaluate(Loaded(llama(), tokenizer, "m"), tasks, data="nowhere.jsonl", **option)


def test_glue_heeds_no_template(tmp_path, tokenizer):
    loaded = run_of(tmp_path, tokenizer, task_type="SEQ_CLS")
    with pytest.raises(InputError, match="prompt_template means nothing to glue:sst2"):
        bonetune.evaluate(loaded, ["glue:sst2"], data="nowhere.jsonl", prompt_template="{instruction}")


def test_a_protocol_names_what_its_task_used_alone(tmp_path, tokenizer):
    data = rows_file(tmp_path, {"text": "the quick brown fox", "other": "a lazy dog"})
    told = {"data": data, "dataset_field": ["other"], "prompt_template": "{instruction}!"}
    loss, perplexity = bonetune.evaluate(Loaded(llama(), tokenizer, "m"), ["loss", "perplexity"], **told)
    assert "; rows of data.jsonl; fields other; bonetune" in perplexity.protocol
    assert "; rows read as text (other); rows of data.jsonl; bonetune" in loss.protocol
    assert "template" not in perplexity.protocol + loss.protocol


def resumed(model, data, tmp_path, name="o", **told):
    told = {"tasks": ["exact-match"], "max_new_tokens": 2, "output_dir": str(tmp_path / name)} | told
    return bonetune.evaluate(model, data=str(data), resume=True, **told)


def test_a_model_that_changes_is_not_gone_on_with(data, model_folder, tmp_path):
    """Whatever file of it has changed."""
    folder = tmp_path / "m"
    shutil.copytree(model_folder, folder)
    (folder / "model.safetensors").unlink()
    model = llama()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    first = resumed(str(folder), data, tmp_path)
    assert resumed(str(folder), data, tmp_path) == first
    model.lm_head.weight.data.mul_(1.5)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"made with other settings \(weights \("):
        resumed(str(folder), data, tmp_path)
    resumed(str(folder), data, tmp_path, "other")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(InputError, match=r"made with other settings \(tokenizer \("):
        resumed(str(folder), data, tmp_path, "other")


def test_an_adapters_configuration_and_run_are_part_of_it(data, model_folder, tmp_path):
    folder = tmp_path / "adapter"
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), BoneConfig(r=4, target_modules="all-linear"))
    model.save_pretrained(folder)
    first = resumed(str(folder), data, tmp_path)
    (folder / "run.yaml").write_text("prompt_template: 'Q {instruction}'\n")
    with pytest.raises(InputError, match=r"made with other settings \(run \("):
        resumed(str(folder), data, tmp_path)
    (folder / "run.yaml").unlink()
    assert resumed(str(folder), data, tmp_path) == first
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"layers_to_transform": [0]}))
    with pytest.raises(InputError, match=r"made with other settings \(adapter_config \("):
        resumed(str(folder), data, tmp_path)


def test_the_base_that_forgetting_is_measured_against_is_known_by_its_weights(model_folder, tmp_path):
    base, rows = tmp_path / "base", rows_file(tmp_path, {"text": "the quick brown fox"})
    shutil.copytree(model_folder, base)
    told = {"tasks": ["forgetting"], "base": str(base)}
    resumed(str(model_folder), rows, tmp_path, **told)
    changed = llama()
    changed.lm_head.weight.data.mul_(1.5)
    changed.save_pretrained(base)
    with pytest.raises(InputError, match=r"made with other settings \(base_weights \("):
        resumed(str(model_folder), rows, tmp_path, **told)


def test_a_loaded_model_is_known_by_what_is_in_memory(data, tokenizer, tmp_path):
    def loaded(alpha=8):
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_alpha=alpha, target_modules="all-linear", init_lora_weights=False)
        return Loaded(get_peft_model(llama(), config).eval(), tokenizer, "m")

    first = resumed(loaded(), data, tmp_path)
    assert resumed(loaded(), data, tmp_path) == first
    changed = loaded()
    changed.model.get_parameter("base_model.model.lm_head.weight").data[3, 5] += 1
    for other in (changed, loaded(alpha=800)):
        with pytest.raises(InputError, match=r"made with other settings \(weights \("):
            resumed(other, data, tmp_path)
    tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(InputError, match=r"made with other settings \(tokenizer \("):
        resumed(loaded(), data, tmp_path)


def test_a_model_without_fingerprint_is_not_gone_on_with(data, model_folder, tmp_path, monkeypatch):
    folder, tokenizer = tmp_path / "m", load_tokenizer(str(model_folder))
    shutil.copytree(model_folder, folder)
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(EVALUATE, "load_model", lambda *_, **__: Loaded(llama(), tokenizer, "m"))
    resumed(str(folder), data, tmp_path)
    with pytest.raises(InputError, match=r"has no fingerprint .* Pass --overwrite"):
        resumed(str(folder), data, tmp_path)


def test_a_base_that_is_missing_is_told_of_before_the_work(tmp_path, model_folder, monkeypatch):
    monkeypatch.setattr(EVALUATE, "load_model", None)
    data = rows_file(tmp_path, {"text": "the quick brown fox"})
    with pytest.raises(InputError, match="has no adapter: name it with base"):
        bonetune.evaluate(str(model_folder), ["perplexity", "forgetting"], data=data)
    with pytest.raises(InputError, match="Model folder /no/such/base does not exist"):
        bonetune.evaluate(str(model_folder), ["perplexity", "forgetting"], data=data, base="/no/such/base")


def test_each_result_is_told_of_when_it_is_there(data, tokenizer, monkeypatch):
    told = []

    def broken(*args, **kwargs):
        raise InputError("broken")

    monkeypatch.setattr("bonetune.evaluation.rows.generate_batches", broken)
    loaded, settings = Loaded(llama(), tokenizer, "m"), {"data": str(data), "on_result": told.append}
    with pytest.raises(InputError, match="broken"):
        bonetune.evaluate(loaded, ["loss", "exact-match"], **settings)
    assert [result.task for result in told] == ["loss"]


def test_a_score_that_is_no_number_is_null_in_files(data, tokenizer, tmp_path):
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[7] = math.nan
    for _ in range(2):
        (result,) = resumed(Loaded(model, tokenizer, "m"), data, tmp_path, tasks=["loss"])
        assert math.isnan(result.score)
        assert not any("NaN" in file.read_text() for file in (tmp_path / "o").iterdir())
        (scores,) = json.loads((tmp_path / "o" / "scores.json").read_text())
        assert scores["score"] is None


def test_what_was_finished_keeps_its_dtype(data, model_folder, tmp_path):
    for _ in range(2):
        resumed(str(model_folder), data, tmp_path, tasks=["loss"])
        (scores,) = json.loads((tmp_path / "o" / "scores.json").read_text())
        assert scores["dtype"] == "float32"


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_the_command_line_shows_what_was_done_before_an_error(data, model_folder, monkeypatch, capfd, form):
    def broken(*args, **kwargs):
        raise InputError("broken")

    monkeypatch.setattr("bonetune.evaluation.rows.generate_batches", broken)
    command = ["bonetune", "eval", str(model_folder), "--tasks", "loss,exact-match", "--data", str(data), *form]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stop:
        main()
    said = capfd.readouterr()
    assert stop.value.code == 2
    assert "broken" in said.err
    assert [line["task"] for line in json.loads(said.out)] == ["loss"] if form else said.out.startswith("loss: ")


def test_the_command_line_warns_of_a_score_that_is_no_number(data, model_folder, tmp_path, monkeypatch, capfd):
    ruined = llama()
    with torch.no_grad():
        ruined.lm_head.weight[7] = math.nan
    shutil.copytree(model_folder, tmp_path / "m")
    ruined.save_pretrained(tmp_path / "m")
    monkeypatch.setattr(
        sys, "argv", ["bonetune", "eval", str(tmp_path / "m"), "--tasks", "loss", "--data", str(data), "--json"]
    )
    with pytest.raises(SystemExit):
        main()
    said = capfd.readouterr()
    assert json.loads(said.out)[0]["score"] is None
    assert "NaN" not in said.out
    assert "loss: the score is nan, no finite number" in said.err
