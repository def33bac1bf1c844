r"""GSM8K (arXiv 2110.14168) as others ask and judge it: prompts, where answers end, what is read out of them, what is right.

A row has the public files' fields: `question`, and `answer`, a worked answer that ends with "#### N".
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal, DecimalException
from fractions import Fraction
from typing import Any

from bonetune.data import PAPER_PROMPT, read_rows
from bonetune.errors import InputError
from bonetune.evaluation.ledger import Ledger
from bonetune.evaluation.questions import Protocol, each, templated
from bonetune.evaluation.result import Record, TaskResult
from bonetune.evaluation.task import Prepared, Request, Task
from bonetune.models import Loaded

# MetaMath's eval_gsm8k.py (github.com/meta-math/MetaMath); its eval_math.py has the same prompt and stops.
METAMATH_PROMPT = PAPER_PROMPT + " Let's think step by step."
METAMATH_STOP = (
    "Question:", "Question", "USER:", "USER", "ASSISTANT:", "ASSISTANT",
    "Instruction:", "Instruction", "Response:", "Response",
)  # fmt: skip
METAMATH_NEW_TOKENS = 512

# lm-evaluation-harness 0.4.13, task gsm8k, version 3; its HF models generate 256 tokens where a task does not say how many,
# and end an answer at the end-of-text token too.
LM_EVAL_PROMPT = "Question: {instruction}\nAnswer:"
LM_EVAL_STOP = ("Question:", "</s>", "<|im_end|>")
LM_EVAL_NEW_TOKENS = 256

# PEFT's method_comparison/MetaMathQA, default_training_params.json; without stops. Prompt and answer have 800 tokens at most.
ARENA_PROMPT = "Question: {instruction} Think step by step.\nAnswer:"
ARENA_NEW_TOKENS = 300


def metamath_number(output: str) -> int | None:
    r"""The number that MetaMath's `extract_answer_number` reads out of an answer; None, which is wrong, if it reads none.

    It is the first match of `[\-+]?\d*[\.,/]?\d+` after the last "The answer is: ", rounded, with what that entails:

    * The words are exactly these, a space behind the colon; "The answer is 5" has no answer.
    * The number may stand anywhere behind them, after other words and lines.
    * One separator is read: of 1,234,567 the 1,234; of 10.5/2 the 10.5; and x^2 + 3 is 2.
    * Rounding is Python's, half to even: 2.5 and 3/2 are 2, and 17.6 is right where 18 is asked for.
    * A fraction over 0 is its numerator. A bare /5 is no answer.
    * Where the original ends with an exception (3/00, numbers too large for a float), there is no answer.
    """
    _, marker, rest = output.rpartition("The answer is: ")
    found = re.search(r"[\-+]?\d*[\.,/]?\d+", rest) if marker else None
    if found is None:
        return None
    numerator, slash, denominator = found[0].replace(",", "").partition("/")
    try:
        return round(float(numerator) / float(denominator) if slash and denominator != "0" else float(numerator))
    except (ValueError, OverflowError, ZeroDivisionError):
        return None


def metamath_reference_number(answer: str) -> int:
    """The number in a row's `answer`: what stands after its first "#### ", up to a second; a whole one.

    Raises `InputError` if there is none.
    """
    try:
        return int(answer.split("#### ")[1].replace(",", ""))
    except (IndexError, ValueError) as error:
        raise InputError(f"The answer {answer[-60:]!r} has no whole number after '#### ': write it there.") from error


def judge_metamath(output: str, row: Mapping[str, Any]) -> Record:
    """What `gsm8k:metamath` records of an answer: right if the two numbers are equal as floats, as the original compares."""
    answer, expected = metamath_number(output), metamath_reference_number(row["answer"])
    return {"answer": answer, "expected": expected, "correct": answer is not None and float(answer) == float(expected)}


_MARKER = re.compile(r"the answer is\b:?|####", re.IGNORECASE)
_SIGNS = re.compile(r"\\?[$%\u20ac\u00a3\u00a5]|\*\*")  # dollar, percent, euro, pound, yen; bold face
# One with a whole number before it, and one without. What is neither, or has a digit behind it, is left as it is.
_LATEX_MIXED = re.compile(
    r"(?<![\w.,/^])([0-9]{1,3}(?:,[0-9]{3})+|[0-9]+) *\\[cdt]?frac *\{ *([0-9]+) *\} *\{ *([0-9]+) *\}(?![0-9])"
)
_LATEX_FRACTION = re.compile(r"(?<![0-9])(?<![0-9] )\\[cdt]?frac *\{([^{}]*)\} *\{([^{}]*)\}(?![0-9])")
_LATEX_LEFT = re.compile(r" *\\[cdt]?frac")
_SPACES = re.compile(r"[\u00a0\u202f\u2009]|\\,")  # of no break, narrow, thin, LaTeX's thin one
# 70 000, but not the 1 100 of 1 100/200, and no part of 12 345 67.
_GROUPED = re.compile(r"(?<![\w.,/^])[1-9][0-9]{0,2}(?: [0-9]{3})+(?![0-9]| ?/ ?[0-9]| [0-9](?![0-9]* ?/ ?[0-9]))")
# What stands behind 5 100 if these are two numbers: 100-dollar notes, 100g bars, 100 dollar notes (but not 100 dollars in all).
_MEASURE = re.compile(r"[-\u2010\u2011\u2013]?[^\W\d_]| [^\W\d_]*[^\W\d_s] [^\W\d_]")
_DASH = re.compile(r"[\u2012\u2013](?=\.?[0-9])")
_SIGN_APART = re.compile(r"((?:^|=|\bis\b:?|[(\[{]) *)- +(?=\.?[0-9])", re.IGNORECASE)
# Digits and whatever binds more digits to them: 1,234.5 and 1 1/2, but also 10:30, 3-4 and 1e5, which are no numbers here.
_DIGITS = re.compile(
    r"(?<![\w.,/^-])(?P<sign>[-+]?)"
    r"(?P<digits>(?:[0-9]+(?:,[0-9]{3})* (?=[0-9]+/[0-9]))?\.?[0-9](?:(?:[0-9.,:/^*\u00d7+-]|[eE](?=[-+]?[0-9]))*[0-9])?)"
)
# What makes a number the beginning of a calculation: an operator with another number behind it.
_OPERATED = r"[)\]}]* *(?:[-+*/^x\u00d7\u00f7\u2012\u2013]|\\(?:times|cdot|div)) *[(\[{]*[-+]?\.?[0-9]"
_CALCULATED = re.compile(_OPERATED)
# The same behind a unit, or an equals sign.
_EQUATED = re.compile(rf" *(?:[^\W\d_]+ *)?(?:{_OPERATED}|[)\]}}]* *=)")
_PLAIN = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_NUMBER = re.compile(rf"(?:([0-9]+|[0-9]{{1,3}}(?:,[0-9]{{3}})+) )?({_PLAIN})(?:/({_PLAIN}))?")


def strict_answer(text: str) -> Fraction | None:
    r"""The number that an answer gives, exactly; None, which is wrong, if it gives none.

    It is the first number of the first line with something in it after the last "The answer is" (in upper or lower case,
    with a colon or without) or "####". A number has a sign or none, thousands separated by commas, by spaces or not (1,234,
    1 234 and 1234, but not 12,34), a decimal point, and may be a fraction (1/2, 1 / 2, 1 1/2, \frac{1}{2}, 1\frac{1}{2}).
    Dollar, euro, pound, yen and percent signs and bold face are left aside: $5, 5% and **5** are 5. If the first digits belong
    to something else (10:30, 3-4, 2^5, 1e5, 1.2.3), there is no answer; digits behind a letter (x2) are passed over.

    * Where the number begins a calculation or an equation, it is the first one behind the line's last "=": of 20 - 2 = 18 it
      is 18. Of a calculation without a result, 20 - 2, there is no answer; only a slash makes a fraction.
    * A minus sign, and an en or figure dash that touches the digits, are signs as a hyphen is. One with a space behind it is a
      sign where no number can stand before it: at the beginning, after an opening bracket, "=" or "is". A line of its own that
      begins "- 5" is an item of a list: 5.
    * A space parts thousands where exactly three digits follow, and no more. Where those measure something, they are a number
      of their own: of 5 100-dollar notes, 5 100g bars, 5 $100 notes and 5 100 dollar notes it is 5. The last is told by a word
      that does not end in s with another behind it, and no group that begins with 0.
    """
    markers = list(_MARKER.finditer(text))
    return _number(text[markers[-1].end() :]) if markers else None


def _number(text: str) -> Fraction | None:
    # before the signs are left aside: 5 $100 notes
    text = _SIGNS.sub("", _GROUPED.sub(_joined, _SPACES.sub(" ", text)))
    line = text.strip().partition("\n")[0]
    if "\n" in text[: len(text) - len(text.lstrip())]:
        line = line.removeprefix("- ")
    line = _DASH.sub("-", line.replace("\u2212", "-").replace("{,}", ","))
    line = _LATEX_FRACTION.sub(r"\1/\2", _LATEX_MIXED.sub(r"\1 \2/\3", line))
    line = _SIGN_APART.sub(r"\1-", re.sub(r"(?<=[0-9]) */ *(?=[0-9])", "/", line))
    found = _DIGITS.search(line)
    number = _NUMBER.fullmatch(found["digits"]) if found else None
    if found and "=" in line[found.end() :] and (number is None or _EQUATED.match(line, found.end())):
        line = line.rpartition("=")[2]
        found = _DIGITS.search(line)
        number = _NUMBER.fullmatch(found["digits"]) if found else None
    left = _LATEX_LEFT.search(line)
    if found is None or number is None or _CALCULATED.match(line, found.end()) or (left and left.start() <= found.end()):
        return None
    whole, numerator, denominator = ((part or "").replace(",", "") for part in number.groups())
    try:
        value = Fraction(whole or 0) + Fraction(numerator) / Fraction(denominator or 1)
    except (ZeroDivisionError, ValueError):  # Python reads no number of thousands of digits
        return None
    return -value if found["sign"] == "-" else value


def _joined(found: re.Match[str]) -> str:
    """Digits in groups of three without the spaces; as they are where they are several numbers."""
    several = " 0" not in found[0] and _MEASURE.match(found.string, found.end())
    return found[0] if several else found[0].replace(" ", "")


def strict_reference(answer: str) -> Fraction:
    """The number in a row's `answer`: the one that `strict_answer` reads, else that of an answer which is nothing but a number.

    Raises `InputError` if there is none.
    """
    value = strict_answer(answer) if _MARKER.search(answer) else _number(answer)
    if value is None:
        raise InputError(f"The answer {answer[-60:]!r} has no number after '####': write it there.")
    return value


def judge_strict(output: str, row: Mapping[str, Any]) -> Record:
    """What `gsm8k:strict` and `gsm-symbolic` record of an answer: right if the two numbers are equal, exactly."""
    answer, expected = strict_answer(output), strict_reference(row["answer"])
    return {"answer": None if answer is None else str(answer), "expected": str(expected), "correct": answer == expected}


def few_shot_prompts(
    test_rows: Sequence[Mapping[str, Any]],
    train_rows: Sequence[Mapping[str, Any]],
    shots: int = 5,
    seed: int = 1234,
) -> list[str]:
    """The harness's prompts: before each question other examples, drawn without replacement by one generator for all.

    What is drawn for a row depends on how many rows stand before it, not on how many follow: the first rows of a test set
    have the same prompts as in the whole of it. Several processes of the harness each draw for their own share of the rows,
    and so have other prompts.

    Args:
        test_rows: the rows to ask, from the first on.
        train_rows: all rows of the training set, in its order: 7,473.
        shots: examples for each question.
        seed: the harness's `fewshot_random_seed`.

    Raises:
        InputError: fewer rows to draw from than examples.
    """
    if shots > len(train_rows):
        raise InputError(f"{shots} examples cannot be drawn from {len(train_rows)} rows: give more rows, or fewer shots.")
    draw = random.Random(seed)  # noqa: S311  (a draw to be repeated)
    prompts = []
    for row in test_rows:
        examples = draw.sample(train_rows, shots) if shots else []
        shown = [f"{_question_prompt(example)} {example['answer']}\n\n" for example in examples]
        prompts.append("".join(shown) + _question_prompt(row))
    return prompts


def _question_prompt(row: Mapping[str, Any]) -> str:
    return LM_EVAL_PROMPT.replace("{instruction}", row["question"])


def strict_match(output: str) -> str:
    r"""What the harness's filter `strict-match` takes: the first `#### (\-?[0-9\.\,]+)`, else "[invalid]"."""
    found = re.search(r"#### (-?[0-9.,]+)", output)
    return found[1] if found else "[invalid]"


def flexible_extract(output: str) -> str:
    r"""What the harness's filter `flexible-extract` takes: the last `(-?[$0-9.,]{2,})|(-?[0-9]+)`, else "[invalid]".

    Any two of these signs are enough for it: of "18 ..." it takes the dots.
    """
    found = re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", output)
    return found[-1] if found else "[invalid]"


def exact_match(extracted: str, reference: str) -> bool:
    """Whether the harness's `exact_match` of the task finds what was taken equal to a row's `answer`.

    Both are compared as texts, in lower case, without commas, dollar signs, all up to the last "#### " and a full stop at the
    end; in this order. So 18.0 is not 18, and 18.. is not 18 either.
    """
    return _as_compared(extracted) == _as_compared(reference)


def _as_compared(text: str) -> str:
    for ignored in (r",", r"\$", r"(?s).*#### ", r"\.$"):
        text = re.sub(ignored, "", text)
    return text.lower()


def judge_lm_eval(output: str, row: Mapping[str, Any]) -> Record:
    """What `gsm8k:lm-eval` records of an answer: `correct` by strict-match, and `flexible` by flexible-extract."""
    strict, flexible, reference = strict_match(output), flexible_extract(output), row["answer"]
    return {
        "answer": strict,
        "flexible_answer": flexible,
        "expected": _as_compared(reference),
        "correct": exact_match(strict, reference),
        "flexible": exact_match(flexible, reference),
    }


def arena_answer(text: str) -> str | None:
    """The text that PEFT's `parse_answer` reads out of a text; None, which is wrong, if it reads none.

    It is the rest of the line after the last "The answer is: ", without the signs " .!?$%" at its ends. If these words do not
    occur, "The answer is " is looked for, then "The final answer is: ", "The final answer is ", and at last "#### ": the words
    decide, not the place, so that "#### 5" is not read where "The answer is: " stood before it.
    """
    text = text.strip().rstrip(".!?")
    for words in ("The answer is: ", "The answer is ", "The final answer is: ", "The final answer is ", "#### "):
        _, marker, rest = text.rpartition(words)
        if marker:
            return rest.strip().split("\n", 1)[0].strip(" .!?$%")
    return None


def judge_arena(output: str, row: Mapping[str, Any]) -> Record:
    """What `gsm8k:arena` records of an answer, by PEFT's `get_accuracy`.

    Right is a number, or a fraction of two, that is equal as a float; other texts must be the same. Commas make a text of a
    number: where 1,234 is asked for, 1234 is wrong. The prompt is read along with the answer, as there: an answer without the
    words has that of the question, if the question has them. Where the original ends with an exception (sNaN), it is wrong.

    Raises `InputError` if nothing can be read out of the row's `answer`.
    """
    answer = arena_answer(ARENA_PROMPT.replace("{instruction}", row["question"]) + output)
    expected = arena_answer(row["answer"])
    if expected is None:
        raise InputError(f"The answer {row['answer'][-60:]!r} has no '#### ' with a number behind it: write it there.")
    correct = answer is not None and _arena_value(answer) == _arena_value(expected)
    return {"answer": answer, "expected": expected, "correct": correct}


def _arena_value(text: str) -> float | str:
    numerator, slash, denominator = text.partition("/")
    try:
        value = Decimal(numerator.strip())
        return float(value / Decimal(denominator.strip()) if slash else value)
    except (DecimalException, ValueError):
        return text


def _few_shot(rows: Sequence[Record], request: Request) -> list[str]:
    _without_template(request, "gsm8k:lm-eval")
    source = request.few_shot or (_HUB if request.data is None else None)
    if source is None:
        raise InputError("gsm8k:lm-eval shows 5 training problems before each: name their file with few_shot.")
    return few_shot_prompts(rows, read_rows(source, "train"))


def _arena_prompt(row: Record, request: Request) -> str:
    _without_template(request, "gsm8k:arena")
    return ARENA_PROMPT.replace("{instruction}", row["question"])


def _without_template(request: Request, name: str) -> None:
    if request.prompt_template is not None:
        raise InputError(f"{name} has a prompt of its own: leave prompt_template out, or take gsm8k:strict.")


def _generated_prompt(row: Record, request: Request) -> str:
    return templated(request, request.run.settings.get("prompt_template") or PAPER_PROMPT, row["instruction"])


# What a generation_config may ask for that changes a greedy answer; lengths and the texts' ends are the protocol's.
_CHANGE_GREEDY = (
    "repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
    "sequence_bias", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "min_length",
    "min_new_tokens", "exponential_decay_length_penalty", "num_beams", "length_penalty", "early_stopping", "guidance_scale",
)  # fmt: skip
_CHANGE_NOTHING = {"repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "num_beams": 1, "guidance_scale": 1.0}


class _AsConfigured:
    """A model that generates with what its generation_config changes in greedy answers, as the harness's models do."""

    def __init__(self, model: Any, heeded: Mapping[str, Any]) -> None:
        vars(self).update(_model=model, _heeded=heeded)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._model, name, value)

    def generate(self, **settings: Any) -> Any:
        """The model's own, with those settings."""
        return self._model.generate(**settings, **self._heeded)


def _heeded(model: Any) -> dict[str, Any]:
    own = {name: getattr(model.generation_config, name, None) for name in _CHANGE_GREEDY}
    return {name: value for name, value in own.items() if value and value != _CHANGE_NOTHING.get(name)}


def _prepare_lm_eval(request: Request) -> Prepared:
    prepared = _LM_EVAL.prepare(request)

    def run(loaded: Loaded, ledger: Ledger) -> TaskResult:
        heeded = _heeded(loaded.model)
        if not heeded:
            return prepared.run(loaded, ledger)
        result = prepared.run(replace(loaded, model=_AsConfigured(loaded.model, heeded)), ledger)
        told = ", ".join(f"{name} {value}" for name, value in heeded.items())
        return replace(result, protocol=f"{result.protocol}, with the model's own {told}")

    return replace(prepared, run=run)


_HUB = "openai/gsm8k:main"
_METAMATH = Protocol(
    name="gsm8k:metamath",
    description="the papers' prompt with \"Let's think step by step.\", MetaMath's stop texts and reading of answers",
    fields=("question", "answer"),
    prompts=each(lambda row, request: templated(request, METAMATH_PROMPT, row["question"])),
    judge=judge_metamath,
    max_new_tokens=METAMATH_NEW_TOKENS,
    stop=METAMATH_STOP,
    source=_HUB,
    check=lambda row: metamath_reference_number(row["answer"]),
)
_LM_EVAL = Protocol(
    name="gsm8k:lm-eval",
    description="lm-evaluation-harness's gsm8k, version 3, 5-shot; the score is strict-match, flexible is flexible-extract",
    fields=("question", "answer"),
    prompts=_few_shot,
    judge=judge_lm_eval,
    max_new_tokens=LM_EVAL_NEW_TOKENS,
    stop=LM_EVAL_STOP,
    source=_HUB,
    also=("flexible",),
    cut_left=True,
    heeds=("few_shot",),
)
_PROTOCOLS = (
    _METAMATH,
    replace(
        _METAMATH,
        name="gsm8k:strict",
        description="the papers' prompt with \"Let's think step by step.\", MetaMath's stop texts; the number after the last "
        "'The answer is' or '####', exactly",
        judge=judge_strict,
        check=lambda row: strict_reference(row["answer"]),
    ),
    Protocol(
        name="gsm8k:arena",
        description="prompt and reading of answers of PEFT's method comparison",
        fields=("question", "answer"),
        prompts=each(_arena_prompt),
        judge=judge_arena,
        max_new_tokens=ARENA_NEW_TOKENS,
        source=_HUB,
        heeds=(),
    ),
    Protocol(
        name="gsm-symbolic",
        description="reasoning-gym's gsm_symbolic, the prompt of the adapter's training, else the papers'; the number after "
        "the last 'The answer is' or '####', exactly",
        fields=("instruction", "output"),
        prompts=each(_generated_prompt),
        judge=lambda output, row: judge_strict(output, {"answer": row["output"]}),
        max_new_tokens=METAMATH_NEW_TOKENS,
        stop=METAMATH_STOP,
        source="reasoning-gym:gsm_symbolic",
        split="test[:500]",
        check=lambda row: strict_reference(row["output"]),
    ),
)
TASKS = (Task(_LM_EVAL.name, _prepare_lm_eval, heeds=_LM_EVAL.heeds), *(protocol.task for protocol in _PROTOCOLS))
