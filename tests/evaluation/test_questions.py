import json
import shutil
from importlib import import_module

import pytest
from conftest import llama
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import bonetune
from bonetune import BoneConfig
from bonetune.errors import InputError
from bonetune.evaluation.questions import Protocol, each, templated
from bonetune.models import generate

EVALUATE = import_module("bonetune.evaluation.evaluate")  # the function has its name
ROWS = [{"question": question, "answer": "x"} for question in ("the fox", "a", "what is one", "lazy dog", "two plus three")]


def judged(output, row):
    return {"answer": output[-1:], "expected": row["answer"], "correct": "e" in output, "long": len(output) > 8}


SPELLING = Protocol(
    name="spelling",
    description="whether there is an e in it",
    fields=("question", "answer"),
    prompts=each(lambda row, request: templated(request, "Q: {instruction}", row["question"])),
    judge=judged,
    max_new_tokens=6,
    also=("long",),
)


@pytest.fixture
def asked(tmp_path, model_folder, monkeypatch):
    """`evaluate` of the protocol above on five questions, two at a time."""
    monkeypatch.setitem(EVALUATE.TASKS, "spelling", SPELLING.task)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def ask(**changes):
        settings = {"data": str(data), "batch_size": 2, "output_dir": str(tmp_path / "out")} | changes
        return bonetune.evaluate(str(model_folder), ["spelling"], **settings)[0]

    return ask


def test_each_answer_has_a_record(asked, tokenizer):
    result = asked()
    prompts = [f"Q: {row['question']}" for row in ROWS]
    outputs = generate(llama(), tokenizer, prompts, max_new_tokens=6, batch_size=2)
    assert result.records == [
        {"row": n, "prompt": p, "output": o, "complete": False} | judged(o, row)
        for n, (p, o, row) in enumerate(zip(prompts, outputs, ROWS, strict=True), 1)
    ]
    assert result.score == sum("e" in output for output in outputs) / 5
    assert result.metrics["long"] == sum(len(output) > 8 for output in outputs) / 5
    assert result.metrics["long_low"] < result.metrics["long"] < result.metrics["long_high"]
    assert result.protocol.startswith(
        "spelling: whether there is an e in it; greedy, at most 6 new tokens; rows of rows.jsonl;"
    )


def test_the_users_template_is_told_of(asked):
    result = asked(prompt_template="{instruction}!", max_new_tokens=2)
    assert result.records[1]["prompt"] == "a!"
    assert "greedy, at most 2 new tokens; rows of rows.jsonl; prompt template '{instruction}!'; bonetune" in result.protocol
    with pytest.raises(InputError, match=r"lacks \{instruction\}"):
        asked(prompt_template="!", output_dir=None)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_killed_after_any_batch_it_goes_on_to_the_same_result(asked, tmp_path, batches, monkeypatch):
    whole = asked(output_dir=str(tmp_path / "whole"))
    seen = []

    def kill(task, done, total):
        if len(seen) == batches:
            raise Killed
        seen.append(done)

    with pytest.raises(Killed):
        asked(on_items=kill)
    records = tmp_path / "out" / "spelling.jsonl"
    if batches:  # and in the middle of a line
        records.write_text(records.read_text() + '{"row": 5, "pro')
    with pytest.raises(InputError, match="pass --resume or --overwrite"):
        asked()
    told = []
    assert asked(resume=True, on_items=lambda task, done, total: told.append(done)) == whole
    assert told[-1] == 5
    for name in ("spelling.jsonl", "scores.json"):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "whole" / name).read_text()
    # what is finished is not made again: not even the model is loaded
    monkeypatch.setattr(EVALUATE, "load_model", None)
    assert asked(resume=True) == whole


def test_other_settings_do_not_go_on(asked):
    asked()
    with pytest.raises(InputError, match="made with other settings"):
        asked(resume=True, batch_size=3)
    with pytest.raises(InputError, match="made with other settings"):
        asked(resume=True, limit=4)
    assert asked(overwrite=True, limit=4).items == 4


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a"}, "spelling: row 2 has no 'answer', a text: its rows have the fields question, answer, this one has"),
        ({"question": 3, "answer": "b"}, "spelling: row 2 holds 3 as its 'question', a text"),
    ],
)
def test_rows_are_checked_before_the_model_is_loaded(asked, tmp_path, row, message, monkeypatch):
    monkeypatch.setattr(EVALUATE, "load_model", None)
    file = tmp_path / "bad.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in (ROWS[0], row)))
    with pytest.raises(InputError, match=message):
        asked(data=str(file))


def test_data_may_be_told_task_by_task(asked, tmp_path):
    assert asked(data={"spelling": str(tmp_path / "rows.jsonl")}).items == 5
    with pytest.raises(InputError, match="data names 'loss', which is not among the tasks spelling"):
        asked(data={"loss": "x"}, output_dir=None)
    with pytest.raises(InputError, match="spelling needs data"):
        asked(data=None, output_dir=None)


def test_other_weights_do_not_go_on(asked, tmp_path, model_folder):
    """Neither a model's nor those of an adapter's base."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(model_folder, base)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), BoneConfig(r=4, target_modules="all-linear")).save_pretrained(
        adapter
    )
    for name, model in (("a", base), ("b", adapter)):
        told = {"data": str(tmp_path / "rows.jsonl"), "output_dir": str(tmp_path / name)}
        bonetune.evaluate(str(model), ["spelling"], **told)
        bonetune.evaluate(str(model), ["spelling"], **told, resume=True)
    changed = llama()
    changed.lm_head.weight.data.mul_(1.5)
    changed.save_pretrained(base)
    for name, model, what in (("a", base, "weights"), ("b", adapter, "base_weights")):
        told = {"data": str(tmp_path / "rows.jsonl"), "output_dir": str(tmp_path / name)}
        with pytest.raises(InputError, match=rf"made with other settings \({what} \("):
            bonetune.evaluate(str(model), ["spelling"], **told, resume=True)


def test_scores_of_other_tasks_stay(asked, tmp_path, model_folder):
    asked()
    told = {"data": str(tmp_path / "rows.jsonl"), "dataset_field": ["question", "answer"]}
    bonetune.evaluate(str(model_folder), ["loss"], output_dir=str(tmp_path / "out"), **told)
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert [score["task"] for score in scores] == ["spelling", "loss"]
    assert {score["model"] for score in scores} == {str(model_folder)}
