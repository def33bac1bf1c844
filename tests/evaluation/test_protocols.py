"""The benchmarks' protocols as `evaluate` runs them, with answers that no model had to make."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest
from conftest import llama

import bonetune
from bonetune.data import PAPER_PROMPT, read_rows
from bonetune.errors import InputError
from bonetune.evaluation.evaluate import TASKS
from bonetune.evaluation.task import Request
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
    told = {"few_shot": str(shown), "prompt_template": "{instruction}"}
    with pytest.raises(InputError, match="prompt_template means nothing to gsm8k:lm-eval"):
        evaluated("gsm8k:lm-eval", [MAILS], [""], **told)
    request = Request(data=str(tmp_path / "rows.jsonl"), **told)  # as it is asked for beside a task that heeds it
    with pytest.raises(InputError, match="gsm8k:lm-eval has a prompt of its own"):
        TASKS["gsm8k:lm-eval"].prepare(request)


def test_generated_problems_are_made_and_judged(evaluated):
    source = "reasoning-gym:gsm_symbolic"
    rows = read_rows(source, "test[:4]")
    numbers = [row["output"].rpartition("#### ")[2] for row in rows]
    answers = [f"#### {numbers[0]}", f"The answer is {numbers[1]}.", "no idea", f"#### {Fraction(numbers[3]) + 1}"]
    result, asked = evaluated("gsm-symbolic", None, answers, dataset_split="test[:4]")
    assert asked["prompts"] == [PAPER_PROMPT.replace("{instruction}", row["instruction"]) for row in rows]
    assert [record["correct"] for record in result.records] == [True, True, False, False]


def test_mathematics_has_three_scores(evaluated):
    answers = ["The answer is: 2x", "The answer is: x + x", "The answer is: 3x"]
    result, asked = evaluated("math:metamath", [SUM] * 3, answers)
    assert [record["correct"] for record in result.records] == [True, False, False]
    assert [record["verified"] for record in result.records] == [True, True, False]
    assert result.metrics["verified"] == pytest.approx(2 / 3)
    assert "; verified is by math-verify; " in result.protocol
    assert asked["max_new_tokens"] == 2048
    with pytest.raises(InputError, match=r"math:metamath: row 1: The solution 'It is 2x.' has no answer in"):
        evaluated("math:metamath", [SUM | {"solution": "It is 2x."}], [""])


def test_mathematics_by_the_data_sets_rules_is_told_apart(evaluated):
    halves = SUM | {"solution": "It is $\\boxed{x/2}$."}
    result, _ = evaluated("math:metamath", [halves] * 2, ["The answer is: x / 2", "The answer is: 3x"])
    assert (result.score, result.metrics["hendrycks"], result.metrics["verified"]) == (0, 0.5, 0.5)
    assert [record["hendrycks"] for record in result.records] == [True, False]
    assert "MetaMath's stop texts, reading of answers and equivalence; hendrycks is" in result.protocol


def test_mathematics_stands_without_math_verify(evaluated, tmp_path, monkeypatch):
    told = {"output_dir": str(tmp_path / "out")}
    monkeypatch.setitem(sys.modules, "math_verify", None)
    result, _ = evaluated("math:metamath", [SUM], ["The answer is: 2x"], **told)
    assert result.score == 1
    assert result.metrics.keys() == {"hendrycks", "hendrycks_low", "hendrycks_high", "cut_off"}
    assert "verified" not in result.records[0]
    missing = "; verified is missing (math-verify is not installed: pip install 'bonetune[math]'); greedy"
    assert missing in result.protocol
    monkeypatch.delitem(sys.modules, "math_verify")
    with pytest.raises(InputError, match=r"made with other settings \(verified \(False, now True\)\)"):
        evaluated("math:metamath", [SUM], [""], resume=True, **told)


def test_mathematics_stands_in_another_thread(evaluated):
    with ThreadPoolExecutor(1) as pool:
        result, _ = pool.submit(evaluated, "math:metamath", [SUM], ["The answer is: 2x"]).result()
    assert result.score == 1
    assert "verified is missing (math-verify ends what takes too long by a signal" in result.protocol


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
