"""The benchmarks' protocols as `evaluate` runs them, with answers that no model had to make."""

import json
from fractions import Fraction

import pytest
from conftest import llama

import bonetune
from bonetune.data import PAPER_PROMPT, read_rows
from bonetune.errors import InputError
from bonetune.models import Answer, Loaded, cut

MAILS = {"question": "Ann has 3 eggs and gets 1,200. How many?", "answer": "3 + 1200 = 1203\n#### 1,203"}
HALVES = {"question": "What is half of 36?", "answer": "36 / 2 = 18\n#### 18"}
SUM = {"problem": "What is $x+x$?", "solution": "It is $\\boxed{2x}$."}
SQUARE = {
    "task_id": "Test/0",
    "prompt": 'def square(n):\n    """The square of n."""\n',
    "entry_point": "square",
    "canonical_solution": "    return n * n\n",
    "test": "def check(candidate):\n    assert candidate(3) == 9\n",
}


@pytest.fixture
def evaluated(tmp_path, tokenizer, monkeypatch):
    """`evaluate` of rows with these answers, and what the model was asked."""

    def run(task, rows, answers, **settings):
        def answered(model, tokenizer, prompts, **told):
            asked.update(told, prompts=prompts)
            yield {number: Answer(cut(answer, told["stop"]), complete=number > 0) for number, answer in enumerate(answers)}

        monkeypatch.setattr("bonetune.evaluation.questions.generate_batches", answered)
        if rows is not None:
            (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            settings["data"] = str(tmp_path / "rows.jsonl")
        (result,) = bonetune.evaluate(Loaded(llama(), tokenizer, "m"), [task], **settings)
        return result, asked

    asked = {}
    return run


ANSWERS = ["So it is 1203. The answer is: 1203\nQuestion: more The answer is: 5", "36/2 = 18\n#### 18"]


@pytest.mark.parametrize(
    ("task", "correct", "most"),
    [("gsm8k:metamath", [True, False], 512), ("gsm8k:strict", [True, True], 512), ("gsm8k:arena", [False, True], 300)],
)
def test_gsm8k(task, correct, most, evaluated):
    result, asked = evaluated(task, [MAILS, HALVES], ANSWERS)
    assert [record["correct"] for record in result.records] == correct
    assert result.score == sum(correct) / 2
    assert asked["max_new_tokens"] == most
    assert result.protocol.startswith(f"{task}: ")
    assert result.protocol.endswith("; rows of rows.jsonl; bonetune 0.1.0")
    assert result.metrics["cut_off"] == 1
    assert [record["complete"] for record in result.records] == [False, True]
    if task == "gsm8k:arena":
        assert asked["prompts"][1] == "Question: What is half of 36? Think step by step.\nAnswer:"
        assert not asked["stop"]
    else:
        asking = PAPER_PROMPT.replace("{instruction}", HALVES["question"])
        assert asked["prompts"][1] == f"{asking} Let's think step by step."
        assert result.records[0]["output"] == "So it is 1203. The answer is: 1203\n"


def test_gsm8k_of_lm_eval_shows_training_problems(evaluated, tmp_path):
    shown = tmp_path / "train.jsonl"
    shown.write_text("".join(json.dumps(HALVES | {"question": f"{n}?"}) + "\n" for n in range(9)))
    result, asked = evaluated("gsm8k:lm-eval", [MAILS, HALVES], [" #### 1203", " 17 or 18"], few_shot=str(shown))
    assert [prompt.count("Question: ") for prompt in asked["prompts"]] == [6, 6]
    assert asked["cut_left"]
    assert (result.score, result.metrics["flexible"]) == (0.5, 1.0)
    with pytest.raises(InputError, match="shows 5 training problems before each: name their file with few_shot"):
        evaluated("gsm8k:lm-eval", [MAILS], [""])
    with pytest.raises(InputError, match="has a prompt of its own"):
        evaluated("gsm8k:lm-eval", [MAILS], [""], few_shot=str(shown), prompt_template="{instruction}")


def test_generated_problems_are_made_and_judged(evaluated):
    source = "reasoning-gym:gsm_symbolic"
    rows = read_rows(source, "test[:4]")
    numbers = [row["output"].rpartition("#### ")[2] for row in rows]
    answers = [f"#### {numbers[0]}", f"The answer is {numbers[1]}.", "no idea", f"#### {Fraction(numbers[3]) + 1}"]
    result, asked = evaluated("gsm-symbolic", None, answers, dataset_split="test[:4]")
    assert asked["prompts"] == [PAPER_PROMPT.replace("{instruction}", row["instruction"]) for row in rows]
    assert [record["correct"] for record in result.records] == [True, True, False, False]


def test_mathematics_has_two_scores(evaluated):
    answers = ["The answer is: 2x", "The answer is: x + x", "The answer is: 3x"]
    result, asked = evaluated("math:metamath", [SUM] * 3, answers)
    assert [record["correct"] for record in result.records] == [True, False, False]
    assert [record["verified"] for record in result.records] == [True, True, False]
    assert result.metrics["verified"] == pytest.approx(2 / 3)
    assert asked["max_new_tokens"] == 2048
    with pytest.raises(InputError, match=r"math:metamath: row 1: The solution 'It is 2x.' has no answer in"):
        evaluated("math:metamath", [SUM | {"solution": "It is 2x."}], [""])


@pytest.mark.parametrize(
    ("task", "answers"),
    [
        ("humaneval", ["    return n * n\n\nprint(square(2))", "    return n\n", "    while True: pass\n"]),
        ("humaneval:instruct", ["```python\ndef square(n):\n    return n * n\n```", "```python\nreturn n\n```", "No."]),
    ],
)
def test_programs_are_run(task, answers, evaluated, monkeypatch):
    monkeypatch.setattr("bonetune.evaluation.humaneval.SECONDS", 1.0)
    result, asked = evaluated(task, [SQUARE] * 3, answers)
    assert [record["correct"] for record in result.records] == [True, False, False]
    assert [record["ended"] for record in result.records][:2] == ["passed", "failed"]
    assert (asked["prompts"][0] == SQUARE["prompt"]) == (task == "humaneval")
    assert "a sandbox" in result.protocol


def test_a_row_that_cannot_be_judged_is_found_before(evaluated):
    with pytest.raises(InputError, match=r"gsm8k:strict: row 2: "):
        evaluated("gsm8k:strict", [HALVES, HALVES | {"answer": "eighteen"}], ["", ""])
    with pytest.raises(InputError, match=r"humaneval: row 1: The prompt of Test/0 has no 'def cube'"):
        evaluated("humaneval", [SQUARE | {"entry_point": "cube"}], [""])
