import copy
import json
import random
import re
from decimal import Decimal, DivisionByZero, InvalidOperation
from fractions import Fraction
from pathlib import Path

import lm_eval
import pytest
import torch
import yaml
from conftest import llama
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import exact_match_fn
from lm_eval.api.task import ConfigurableTask
from lm_eval.defaults import DEFAULT_MAX_GEN_TOKS
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import get_peft_model

import bonetune
from bonetune import BoneConfig
from bonetune.data import reasoning_problems
from bonetune.errors import InputError
from bonetune.evaluation import gsm8k
from bonetune.models import Loaded

YAML = Path(lm_eval.__file__).parent / "tasks/gsm8k/gsm8k.yaml"

# What outputs are made of that is hard to read.
PIECES = st.sampled_from(
    [
        *"0123456789.,/-+ \n$%*^e:=x!}", "18", "1,000", "10,000,000", "1/2", "/0", "1_0", "NaN", "sNaN", "Infinity", "...",
        "The answer is: ", "The answer is ", "the answer is", "The final answer is: ", "The final answer is ", "#### ", "####",
        "[invalid]", "\\frac{1}{2}", "\\boxed{", "\u0663", "\u00bd", "\u2212", "\u2013", "\u2012", "\u00a0", "\u202f",
        "\\tfrac{1}{2}", "\\frac12", " 000", " 100-dollar notes", "- 5", " is ",
    ]
)  # fmt: skip
OUTPUTS = st.lists(PIECES, max_size=12).map("".join)


def row(answer="18", question="How many?"):
    return {"question": question, "answer": f"9 * 2 = <<9*2=18>>18\n#### {answer}"}


def extract_answer_number(completion):
    """The steps of MetaMath's function of this name, one by one; an exception of its own is no answer."""
    parts = completion.split("The answer is: ")
    if len(parts) == 1:
        return None
    found = re.compile(r"[\-+]?\d*[\.,/]?\d+").search(parts[-1].strip())
    if found is None:
        return None
    text = found.group()
    try:
        if "/" not in text:
            number = float(text.replace(",", ""))
            return None if number == float("inf") else round(number)
        numerator, denominator = text.split("/")[0], text.split("/")[1]
        if numerator.strip("+-") == "":  # is_number is false
            return None
        if denominator == "0":
            return round(float(numerator))
        fraction = Fraction(text)
        return round(float(fraction.numerator / fraction.denominator))
    except (OverflowError, ZeroDivisionError):
        return None


@settings(max_examples=1000, deadline=None)
@given(OUTPUTS.map(lambda text: f"So.\nThe answer is: {text}"))
@example("The answer is: 1" + "0" * 400)
@example("The answer is: -" + "9" * 400)
@example("The answer is 5")
@example("#### 5")
@example("")
def test_metamath_reads_what_the_original_reads(output):
    assert gsm8k.metamath_number(output) == extract_answer_number(output)


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("18", 18), ("$1,000.", 1000), ("1,234,567", 1234), ("-5", -5), ("2.5", 2), ("3.5", 4), ("3/2", 2), ("5/0", 5),
        ("3/00", None), ("/5", None), (",5", 5), ("x^2 + 3", 2), ("none", None), ("\n\nten\n7", 7), ("1/2/3", 0),
        ("10.5/2", 10),
    ],
)  # fmt: skip
def test_quirks_of_metamath(said, read):
    assert gsm8k.metamath_number(f"The answer is: 4. The answer is: {said}") == read


def test_metamath_judges_rounded_numbers():
    assert gsm8k.judge_metamath("The answer is: 17.6", row()) == {"answer": 18, "expected": 18, "correct": True}
    assert gsm8k.judge_metamath("The answer is: 18 eggs", row("1,018"))["correct"] is False
    assert gsm8k.judge_metamath("18", row()) == {"answer": None, "expected": 18, "correct": False}
    assert gsm8k.metamath_reference_number("#### 2,125") == 2125
    # all numbers of this size are one float
    assert gsm8k.judge_metamath(f"The answer is: {2**53 + 1}", row(str(2**53)))["correct"] is True


def test_prompts():
    beginning = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    prompt = gsm8k.METAMATH_PROMPT.format(instruction="Q?")
    assert prompt == beginning + "### Instruction:\nQ?\n\n### Response: Let's think step by step."
    assert gsm8k.ARENA_PROMPT.format(instruction="Q?") == "Question: Q? Think step by step.\nAnswer:"


def written(value, form):
    """A number as texts write it."""
    sign, size = ("-" if value < 0 else ""), abs(value)
    if form == "decimal":
        return f"{sign}{Decimal(size.numerator) / Decimal(size.denominator):f}"
    if form == "grouped":
        return f"{sign}${Decimal(size.numerator) / Decimal(size.denominator):,f}"
    whole, rest = divmod(size.numerator, size.denominator)
    mixed = f"{sign}{whole} {rest}/{size.denominator}"
    latex = f"${sign}\\frac{{{size.numerator}}}{{{size.denominator}}}$"
    return {"fraction": f"{sign}{size.numerator} / {size.denominator}", "mixed": mixed, "latex": latex}[form]


@settings(max_examples=500, deadline=None)
@given(
    st.fractions(-(10**7), 10**7, max_denominator=1000),
    st.sampled_from(["fraction", "mixed", "latex"]),
    st.sampled_from(["The answer is: ", "the answer is ", "THE ANSWER IS:\n\n", "#### ", "####", "**The answer is:** "]),
    st.sampled_from(["", ".", "%", " apples", "\n#5", ", or 3", "$.", "th", "**."]),
)
def test_strict_reads_each_number_as_it_is_written(value, form, marker, after):
    assert gsm8k.strict_answer(f"The answer is 7.\nNo. {marker}{written(value, form)}{after}") == value


@settings(max_examples=500, deadline=None)
@given(
    st.decimals(-(10**9), 10**9, places=3),
    st.sampled_from(["decimal", "grouped"]),
    st.sampled_from(["", ".", "\\%", " a 4", "cm"]),
)
def test_strict_reads_decimals(value, form, after):
    assert gsm8k.strict_answer(f"The answer is: {written(Fraction(value), form)}{after}") == Fraction(value)


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("1,234,567", 1234567), ("$1{,}000", 1000), ("\\$5.50", Fraction(11, 2)), (".5", Fraction(1, 2)), ("\u22125", -5),
        ("-$5", -5), ("$-5", -5), ("\\boxed{18}", 18), ("**18**", 18), ("x = 18", 18), ("x2 = 18", 18), ("\u20ac18", 18),
        ("18-year-olds", 18), ("+5", 5), ("12,34", None), ("1.2.3", None), ("10:30", None), ("3-4", None),
        ("2^5", None), ("1e5", None), ("1/0", None), ("1/2/3", None), ("1,2,3", None), ("2*9", None), ("2\u00d79", None),
        ("none", None), ("", None), ("ten\n7", None), ("\\frac12", None), ("7" * 5000, None), ("\u0663", None),
        # a whole number before a fraction
        ("1\\frac{1}{2}", Fraction(3, 2)), ("1\\tfrac{1}{2}", Fraction(3, 2)), ("$-1\\dfrac{1}{2}$", Fraction(-3, 2)),
        ("1 \\frac{1}{2}", Fraction(3, 2)), ("12\\frac{3}{4}", Fraction(51, 4)), ("1,000\\frac{1}{2}", Fraction(2001, 2)),
        ("1,000 1/2", Fraction(2001, 2)), ("1\\frac12", None), ("1\\frac{x}{2}", None), ("1\\frac{-1}{2}", None),
        ("x\\frac{1}{2}", None), ("x2\\frac{1}{2}", None),
        ("x2\\frac{y}{2}", None), ("1.5\\frac{1}{2}", None), ("\\frac{\\text{1}}{2}", None),
        ("\\frac{1}{2} of 3", Fraction(1, 2)), ("\\frac{1}{2}3", None), ("3 of \\frac{{1}}{2}", 3),
        ("1\u00a01/2", Fraction(3, 2)),
        # dashes for signs
        ("\u20135", -5), ("\u20125", -5), ("-5", -5), ("\u2013$5", -5), ("x = \u20135", -5), ("3\u20134", None),
        ("3\u20124", None), ("10 \u2013 5", None), ("\u2013 5", 5), ("18\u2013year-olds", 18), ("\u2013.5", Fraction(-1, 2)),
        # signs that stand apart
        ("- 5", -5), ("-  5", -5), ("- $5", -5), ("$- 5$", -5), ("\u2212 5", -5), ("x = - 5", -5), ("it is - 5", -5),
        ("x is: - 5", -5),
        ("**- 5**", -5), ("\\boxed{- 5}", -5), ("- .5", Fraction(-1, 2)), ("- \\frac{1}{2}", Fraction(-1, 2)),
        ("- 1 1/2", Fraction(-3, 2)), ("- 70 000", -70000), ("+ 5", 5), ("10 - 5", None), ("3 - 4", None), ("x - 5", 5),
        ("this - 5", 5),
        ("\n- 5 apples\n- 3 pears", 5), ("**\n\n- 5", 5),
        # calculations and equations
        ("20 - 2 = 18", 18), ("3 * 6 = 18", 18), ("3 + 4 = 7", 7), ("$20 - $2 = $18.", 18), ("20-2 = 18", 18), ("2*9=18", 18),
        ("3 \u00d7 6 = 18", 18), ("3 x 6 = 18", 18), ("3 \\times 6 = 18", 18), ("36 / 2 = 18", 18), ("36/2", 18),
        ("(20 - 2) = 18", 18), ("(10 + 8) - 2 = 16", 16), ("2 * (4 + 5) = 18", 18), ("3 - 5 = -2", -2), ("3 - 5 = - 2", -2),
        ("x = 3 * 6 = 18", 18), ("20 apples - 2 apples = 18 apples", 18), ("1 500 + 500 = 2 000 km", 2000),
        ("20% + 5% = 25%", 25), ("\\frac{1}{2} + \\frac{1}{2} = 1", 1), ("\\frac12 = 0.5", None),
        ("18 = 9 * 2", None), ("20 - 2", None), ("3 * 6", None), ("3 x 6", None), ("10 + 8 = 9 * 2", None),
        ("20 - 2 =", None), ("18 - the rest", 18), ("18 + tax", 18), ("18/hour", 18), ("18 (20 - 2 = 18)", 18),
        ("18, because 36 = 2 * 18", 18), ("18 since 20 - 2 = 18", 18), ("18 x", 18), ("18\n20 - 2 = 3", 18),
        # thousands after spaces
        ("70 000", 70000), ("70\u00a0000", 70000), ("70\u202f000", 70000), ("70\u2009000", 70000), ("70\\,000", 70000),
        ("$1 234 567.50", Fraction(246913500, 200)), ("-70 000", -70000), ("70 000 dollars", 70000), ("70 000.", 70000),
        ("1 500 km", 1500), ("70 500 dollars in total", 70500), ("1 234 people", 1234), ("70 000 people in all", 70000),
        ("70 000km", 70000), ("1 234/2", 118), ("1 234 1/2", Fraction(2469, 2)), ("70 000-80 000", None), ("70 000,50", None),
        ("5 100-dollar notes", 5), ("5 100 dollar notes", 5), ("5\u00a0100-dollar notes", 5), ("5 100\u2011dollar notes", 5),
        ("5 100g bars", 5), ("5 $100 bills", 5), ("12 34", 12), ("12 3456", 12), ("1234 567", 1234), ("12 345 67", 12),
        ("0 100", 0), ("1.5 100", Fraction(3, 2)), ("1,234 567", 1234), ("5 apples and 100 200 pears", 5),
    ],
)  # fmt: skip
def test_strict(said, read):
    assert gsm8k.strict_answer(f"The answer is: 4.\nThe answer is: {said}") == read


@given(OUTPUTS)
def test_strict_takes_any_text(output):
    gsm8k.strict_answer(output)


def test_strict_needs_a_marker_and_takes_the_last():
    assert gsm8k.strict_answer("It is 18.") is None
    assert gsm8k.strict_answer("The answer isn't 5") is None
    assert gsm8k.strict_answer("#### 5\nThe answer is 6") == 6
    assert gsm8k.strict_answer("The answer is 6 #### 5") == 5
    assert gsm8k.strict_answer("The answer is 6. The answer is") is None


def test_strict_judges_exactly():
    assert gsm8k.judge_strict("#### 36/2", row()) == {"answer": "18", "expected": "18", "correct": True}
    assert gsm8k.judge_strict("The answer is 17.6", row()) == {"answer": "88/5", "expected": "18", "correct": False}
    assert gsm8k.judge_strict("18", row()) == {"answer": None, "expected": "18", "correct": False}


def test_generated_problems():
    for problem in reasoning_problems("gsm_symbolic", 50, 0, worked=True):
        question, worked = (message["content"] for message in problem["messages"])
        answer = worked.rpartition("#### ")[2]
        assert gsm8k.judge_strict(worked, {"question": question, "answer": answer})["correct"] is True
        assert gsm8k.judge_strict(f"The answer is {answer}1", {"question": question, "answer": answer})["correct"] is False


@pytest.mark.parametrize(
    ("judge", "answer", "message"),
    [
        (gsm8k.judge_metamath, "18", "'18' has no whole number after '#### '"),
        (gsm8k.judge_metamath, "#### 1.5", "has no whole number"),
        (gsm8k.judge_strict, "#### many", "'#### many' has no number after '####'"),
        (gsm8k.judge_strict, "many", "has no number"),
        (gsm8k.judge_arena, "18", "'18' has no '#### ' with a number behind it"),
    ],
)
def test_a_row_whose_answer_cannot_be_read(judge, answer, message):
    with pytest.raises(InputError, match=message):
        judge("The answer is: 18", {"question": "?", "answer": answer})


def accuracy(prediction, response):
    """The steps of PEFT's parse_answer, convert_to_decimal and get_accuracy for one answer; exceptions are wrong answers."""

    def parse(text):
        text = text.strip().rstrip(".!?")
        for words in ("The answer is: ", "The answer is ", "The final answer is: ", "The final answer is ", "#### "):
            if words in text:
                return text[text.rindex(words) + len(words) :].strip().split("\n")[0].strip(" .!?$%")
        return None

    def convert(text):
        try:
            if "/" not in text.strip():
                return Decimal(text.strip())
            parts = [Decimal(part.strip()) for part in text.split("/")] if text.count("/") == 1 else None
            return None if parts is None or parts[1] == 0 else parts[0] / parts[1]
        except (DivisionByZero, InvalidOperation, ValueError):
            return None

    predicted, true = parse(prediction), parse(response)
    if predicted is None:
        return False
    numbers = [convert(text) for text in (predicted, true)]
    try:
        values = [text if number is None else float(number) for text, number in zip((predicted, true), numbers, strict=True)]
    except ValueError:
        return False
    return values[0] == values[1]


@settings(max_examples=1000, deadline=None)
@given(
    st.tuples(st.sampled_from(["", "The answer is: ", "The answer is ", "#### ", "The final answer is "]), OUTPUTS).map(
        "".join
    ),
    st.sampled_from(["18", "1,000", "1000", "0.5", "-3", "2"]),
    st.sampled_from(["How many?", "If #### 18 is", "The answer is 18?"]),
)
@example("#### 20/35", "0.5714285714285714", "How many?")
@example("#### 1e999999/1e-999999", "18", "How many?")
def test_the_arena_judges_as_peft_does(output, answer, question):
    prompt = f"Question: {question} Think step by step.\nAnswer:"
    try:
        expected = accuracy(prompt + output, row(answer)["answer"])
    except ArithmeticError:
        expected = False
    assert gsm8k.judge_arena(output, row(answer, question))["correct"] is expected


@pytest.mark.parametrize(
    ("output", "answer", "correct"),
    [
        ("The answer is: 18", "18", True),
        ("The answer is $18.00.", "18", True),
        ("The answer is: 18 eggs", "18", False),
        ("#### 18", "18", True),
        ("The answer is: 17\n#### 18", "18", False),
        ("The answer is: 1000", "1,000", False),
        ("The answer is: 1,000", "1,000", True),
        ("36/2", "18", False),
        ("The final answer is 36/2", "18", True),
    ],
)
def test_quirks_of_the_arena(output, answer, correct):
    assert gsm8k.judge_arena(output, row(answer))["correct"] is correct


def problems(count, seed):
    """Short problems of one kind, every one other."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        a, b = draw.randrange(2, 6), draw.randrange(2, 4)
        name = draw.choice(["Ann {}", "Bob", "Chlo\u00e9 & co", "[Dan]"])
        question = f"{number}. {name} has {a} eggs and gets {b}. How many?"
        rows.append({"question": question, "answer": f"{a} + {b} = {a + b}\n#### {a + b}"})
    return rows


@pytest.fixture(scope="module")
def rows():
    return {"train": problems(40, 0), "test": problems(8, 1)}


@pytest.fixture(scope="module")
def harness(tmp_path_factory, rows):
    """The harness's own configuration, on rows of a local file; a task object holds its requests, so each test makes one."""
    folder = tmp_path_factory.mktemp("gsm8k")
    for split, of_split in rows.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in of_split))
    config = yaml.safe_load(YAML.read_text()) | {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: str(folder / f"{split}.jsonl") for split in rows},
            "cache_dir": str(folder / "cache"),
        },
    }
    config.pop("tag")
    return config


def test_the_harness_is_the_version_that_is_meant(harness):
    assert (harness["metadata"]["version"], harness["num_fewshot"]) == (3, 5)
    assert tuple(harness["generation_kwargs"]["until"]) == gsm8k.LM_EVAL_STOP
    assert DEFAULT_MAX_GEN_TOKS == gsm8k.LM_EVAL_NEW_TOKENS


@pytest.mark.parametrize(("shots", "seed"), [(5, 1234), (5, 7), (1, 1234), (40, 1234), (0, 1234)])
@pytest.mark.parametrize("limit", [None, 3])
def test_prompts_are_the_harnesss(harness, rows, shots, seed, limit):
    task = ConfigurableTask(config=harness | {"num_fewshot": shots})
    task.set_fewshot_seed(seed)
    task.build_all_requests(limit=limit)
    ours = gsm8k.few_shot_prompts(rows["test"][:limit], rows["train"], shots, seed)
    assert ours == [instance.args[0] for instance in task.instances]


def test_more_examples_than_rows(rows):
    with pytest.raises(InputError, match="5 examples cannot be drawn from 4 rows"):
        gsm8k.few_shot_prompts(rows["test"], rows["train"][:4])


@settings(max_examples=1000, deadline=None)
@given(OUTPUTS, st.sampled_from(["18", "1,000", "-3", "0.5", "18.", "[Invalid]", "$5", "#### 5"]))
@example("#### 18.", "18")
@example("so 18 ...", "18")
@example("#### 18.0", "18")
def test_the_harness_reads_and_judges_the_same(output, answer):
    configuration = yaml.safe_load(YAML.read_text())
    metric = {name: value for name, value in configuration["metric_list"][0].items() if name.startswith(("ignore", "regexes"))}
    reference, taken = row(answer)["answer"], {}
    for chosen in configuration["filter_list"]:
        pipeline = [[step.pop("function"), step] for step in chosen["filter"]]
        instance = Instance("generate_until", {}, ("", {}), 0, resps=[output], metadata=("gsm8k", 0, 1))
        lm_eval.filters.build_filter_ensemble(chosen["name"], pipeline).apply([instance])
        taken |= instance.filtered_resps
    matches = {
        name: bool(exact_match_fn(predictions=[text], references=[reference], **metric)["exact_match"])
        for name, text in taken.items()
    }
    judged = gsm8k.judge_lm_eval(output, row(answer))
    assert (judged["answer"], judged["flexible_answer"]) == (taken["strict-match"], taken["flexible-extract"])
    assert (judged["correct"], judged["flexible"]) == (matches["strict-match"], matches["flexible-extract"])


@pytest.fixture(scope="module")
def learned(_tokenizer, rows):
    """A small model that has learned to go on from such prompts with some worked answer, and then with another question."""
    model = llama(max_position_embeddings=2048, tie_word_embeddings=True, initializer_range=0.05)
    prompts = gsm8k.few_shot_prompts(rows["train"][:8], rows["train"], seed=0)
    ids = torch.tensor([_tokenizer(prompt).input_ids[:400] for prompt in prompts])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("context", [2048, 600])
def test_scores_are_the_harnesss(harness, rows, learned, tokenizer, context, monkeypatch):
    """With prompts that fit, and with prompts of which the beginning is cut off, to leave room for the answer."""
    monkeypatch.setattr(learned.config, "max_position_embeddings", context)
    language_model, tasks = HFLM(pretrained=learned, tokenizer=tokenizer, batch_size=3), TaskManager(include_defaults=False)
    found = lm_eval.simple_evaluate(language_model, tasks=[harness], task_manager=tasks, log_samples=True, bootstrap_iters=0)
    prompts = gsm8k.few_shot_prompts(rows["test"], rows["train"])
    assert (len(tokenizer(prompts[0]).input_ids) + gsm8k.LM_EVAL_NEW_TOKENS > context) == (context == 600)
    data, few_shot = (harness["dataset_kwargs"]["data_files"][split] for split in ("test", "train"))
    loaded = Loaded(learned, tokenizer, "m")
    (ours,) = bonetune.evaluate(loaded, ["gsm8k:lm-eval"], data=data, few_shot=few_shot, batch_size=3)
    records, outputs = ours.records, [record["output"] for record in ours.records]
    assert [record["prompt"] for record in records] == prompts
    assert any(output.endswith("\n\n") for output in outputs)  # another question was begun and cut off
    assert {record["answer"] for record in records} != {"[invalid]"}
    for name, answer, score in (("strict-match", "answer", "correct"), ("flexible-extract", "flexible_answer", "flexible")):
        samples = [sample for sample in found["samples"]["gsm8k"] if sample["filter"] == name]
        assert outputs == [sample["resps"][0][0] for sample in samples]
        assert [record[answer] for record in records] == [sample["filtered_resps"][0] for sample in samples]
        assert [record[score] for record in records] == [sample["exact_match"] for sample in samples]
        assert (ours.score if score == "correct" else ours.metrics[score]) == found["results"]["gsm8k"][f"exact_match,{name}"]


def test_what_the_models_generation_config_changes_is_heeded_as_by_the_harness(harness, rows, learned, tokenizer, monkeypatch):
    monkeypatch.setattr(learned.generation_config, "repetition_penalty", 1.5)
    language_model, tasks = HFLM(pretrained=learned, tokenizer=tokenizer, batch_size=3), TaskManager(include_defaults=False)
    found = lm_eval.simple_evaluate(language_model, tasks=[harness], task_manager=tasks, log_samples=True, bootstrap_iters=0)
    data, few_shot = (harness["dataset_kwargs"]["data_files"][split] for split in ("test", "train"))

    def ours(model):
        told = {"data": data, "few_shot": few_shot, "batch_size": 3}
        (result,) = bonetune.evaluate(Loaded(model, tokenizer, "m"), ["gsm8k:lm-eval"], **told)
        return [record["output"] for record in result.records], result.protocol

    samples = [sample for sample in found["samples"]["gsm8k"] if sample["filter"] == "strict-match"]
    outputs, protocol = ours(learned)
    assert outputs == [sample["resps"][0][0] for sample in samples]
    assert "at most 256 new tokens, with the model's own repetition_penalty 1.5; rows of" in protocol
    assert learned.generation_config.repetition_penalty == 1.5
    adapted = get_peft_model(copy.deepcopy(learned), BoneConfig(r=4, target_modules="all-linear"))  # adds nothing yet
    assert ours(adapted) == (outputs, protocol)
    monkeypatch.setattr(learned.generation_config, "repetition_penalty", 1.0)
    others, protocol = ours(learned)
    assert others != outputs
    assert "at most 256 new tokens; rows of" in protocol
