r"""MATH (arXiv 2103.03874) as MetaMath asks it: what is read out of an answer, and when two answers are the same.

A row is the public data set's, `problem` and a `solution` with its answer in \boxed, or MetaMath's: `instruction`, `output`.
Prompt and stops are GSM8K's, `METAMATH_PROMPT` and `METAMATH_STOP` of `bonetune.evaluation.gsm8k`.
"""

import re
import signal
import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from bonetune.errors import InputError
from bonetune.evaluation.gsm8k import METAMATH_PROMPT, METAMATH_STOP
from bonetune.evaluation.questions import Protocol, each, templated
from bonetune.evaluation.result import Record
from bonetune.evaluation.task import Prepared, Request, Task

NEW_TOKENS = 2048

Rules = Literal["metamath", "hendrycks"]

_FIELDS = (("problem", "solution"), ("instruction", "output"))


def problem_and_solution(row: Mapping[str, Any]) -> tuple[str, str]:
    """A row's two texts. Raises `InputError` if it has neither pair of fields, or its solution no answer in a box."""
    for problem, solution in _FIELDS:
        if isinstance(row.get(problem), str) and isinstance(row.get(solution), str):
            if last_boxed(row[solution]) is None:
                raise InputError(f"The solution {row[solution][-60:]!r} has no answer in \\boxed{{...}}: write it there.")
            return row[problem], row[solution]
    names = " or ".join(" and ".join(pair) for pair in _FIELDS)
    raise InputError(f"Rows of MATH have the texts {names}; this one has the fields {', '.join(row) or '(none)'}.")


def last_boxed(text: str) -> str | None:
    r"""What stands in the last \boxed of a text, or in the last \fbox if there is none; None if there is neither.

    Braces may be nested; if they do not close, there is nothing. A box without braces, \boxed 5, ends at the next dollar sign.
    """
    for command in ("\\boxed", "\\fbox"):
        _, found, rest = text.rpartition(command)
        if found:
            rest = rest.lstrip()
            return _in_braces(rest) if rest.startswith("{") else rest.partition("$")[0].strip() or None
    return None


def _in_braces(text: str) -> str | None:
    """What stands between a text's first character, a brace, and the one that closes it."""
    depth = 0
    for brace in re.finditer("[{}]", text):
        depth += 1 if brace[0] == "{" else -1
        if not depth:
            return text[1 : brace.start()]
    return None


def metamath_text(output: str) -> str | None:
    """The text that MetaMath's eval_math.py reads out of an answer; None, which is wrong, if it reads none.

    It is what follows the last "The answer is: ", exactly these words, up to a full stop at a line's end, and without a full
    stop at its own end. So lines that end without a full stop belong to it, with all that follows.
    """
    _, marker, rest = output.rpartition("The answer is: ")
    return rest.split(".\n")[0].strip().removesuffix(".").strip() if marker else None


def metamath_reference_text(solution: str) -> str | None:
    r"""The text in the last \boxed{...} of a solution, as eval_math.py reads it.

    It reads no \fbox, and no \boxed without a brace right behind it: None, and whatever is answered is wrong.
    """
    _, found, rest = solution.rpartition("\\boxed")
    return _in_braces(rest) if found and rest.startswith("{") else None


def judge_metamath(output: str, row: Mapping[str, Any]) -> Record:
    """What `math:metamath` records of an answer as text: right if it is equivalent to the reference by MetaMath's rules.

    `hendrycks` is the same answer by the data set's own rules.
    """
    answer, expected = metamath_text(output), metamath_reference_text(problem_and_solution(row)[1])

    def same(rules: Rules) -> bool:
        return answer is not None and expected is not None and equivalent(answer, expected, rules)

    return {"answer": answer, "expected": expected, "correct": same("metamath"), "hendrycks": same("hendrycks")}


def equivalent(one: str, other: str, rules: Rules = "metamath") -> bool:
    r"""Whether two answers are the same text once both are normalized.

    An answer that cannot be (see `normalized`) is the same only as one that is written like it, letter by letter.

    Args:
        one, other: the answers.
        rules: MetaMath's (its util.py), or those of the MATH data set (github.com/hendrycks/math, math_equivalence.py). They
            differ at one slash between anything but whole numbers, x/2: MetaMath's cannot normalize it, the data set's leave
            it as it is. So x/2 is x / 2 by the data set's rules, and not by MetaMath's. Neither knows a percent sign without
            a backslash.
    """
    try:
        return normalized(one, rules) == normalized(other, rules)
    except ValueError:
        return one == other


_REPLACED = (
    ("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"), ("\\left", ""), ("\\right", ""),
    ("^{\\circ}", ""), ("^\\circ", ""), ("\\$", ""),
)  # fmt: skip


def normalized(text: str, rules: Rules = "metamath") -> str:
    r"""An answer in the form in which it is compared, rule by rule and in this order:

    1. No line ends, \! , \left, \right, degrees and dollars; one backslash for two; \frac for \tfrac and \dfrac. As text, not
       as commands: \leftarrow becomes arrow.
    2. Nothing from "\text{ " on, which begins a unit; no percent signs with a backslash.
    3. A zero before a decimal point that begins the text, or follows a space or a brace.
    4. The right side of a single equation whose left side has two characters at most, the space among them: "k = ", "x=".
    5. \sqrt{3} for \sqrt3; of "\sqrt 3" the space is braced.
    6. No spaces.
    7. \frac{1}{2} for \frac12 and \frac1{2}; but if a single character stands behind a \frac, every one is left as it is.
    8. \frac{1}{2} for 0.5, and \frac{a}{b} for a/b of whole numbers.

    Raises:
        ValueError: what the original fails at: a \frac or \sqrt with nothing behind it, two units; by MetaMath's rules also a
            single slash between anything but whole numbers.
    """
    for old, new in _REPLACED:
        text = text.replace(old, new)
    text, *units = text.split("\\text{ ")
    if len(units) > 1:
        raise ValueError("two units")
    text = text.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if text.startswith("."):
        text = "0" + text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:
        text = sides[1]
    if re.search(r"\\sqrt(\\sqrt|\Z)", text):
        raise ValueError("a root of nothing")
    text = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", text).replace(" ", "")
    text = _braced_fractions(text)
    if text == "0.5":
        return "\\frac{1}{2}"
    try:
        return _slash_as_fraction(text)
    except ValueError:
        if rules == "metamath":
            raise
        return text


def _braced_fractions(text: str) -> str:
    before, *fractions = text.split("\\frac")
    braced = [before]
    for fraction in fractions:
        if not fraction:
            raise ValueError("a fraction of nothing")
        if fraction[0] == "{":
            braced.append(fraction)
        elif len(fraction) == 1:
            return text
        else:
            numerator, denominator, rest = fraction[0], fraction[1], fraction[2:]
            braced.append(f"{{{numerator}}}{{{rest}" if denominator == "{" else f"{{{numerator}}}{{{denominator}}}{rest}")
    return "\\frac".join(braced)


def _slash_as_fraction(text: str) -> str:
    parts = text.split("/")
    if len(parts) != 2:
        return text
    numerator, denominator = map(int, parts)
    return f"\\frac{{{numerator}}}{{{denominator}}}" if text == f"{numerator}/{denominator}" else text


def unverifiable() -> str | None:
    """Why math-verify cannot judge here; None: it can."""
    try:
        import math_verify  # noqa: F401
    except ImportError:
        return "math-verify is not installed: pip install 'bonetune[math]'"
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        return "math-verify ends what takes too long by a signal, which only the main thread on Linux or macOS receives"
    return None


def verify(output: str, solution: str) -> bool:
    r"""Whether math-verify finds an answer equal to a solution's: as mathematics, like x+1 and 1+x, not as text.

    What it is given is the answer as `metamath_text` reads it, in a box, for it reads bare LaTeX badly; the whole output if
    there is no such answer. The solution's is `last_boxed`. What takes more than five seconds to read or to compare is wrong.
    The seconds are counted by SIGALRM: an alarm that someone else has set is lost.

    Raises:
        InputError: math-verify cannot judge here (see `unverifiable`); the solution has no box.
    """
    if reason := unverifiable():
        raise InputError(f"Answers cannot be verified here: {reason}.")
    import math_verify

    expected, answer = last_boxed(solution), metamath_text(output)
    if expected is None:
        raise InputError(f"The solution {solution[-60:]!r} has no answer in \\boxed{{...}}: write it there.")
    found = math_verify.parse(output if answer is None else f"\\boxed{{{answer}}}")
    return math_verify.verify(math_verify.parse(f"\\boxed{{{expected}}}"), found)


def _judge_verified(output: str, row: Record) -> Record:
    return judge_metamath(output, row) | {"verified": verify(output, problem_and_solution(row)[1])}


_METAMATH = Protocol(
    name="math:metamath",
    description="the papers' prompt with \"Let's think step by step.\", MetaMath's stop texts, reading of answers and "
    "equivalence; hendrycks is the same answer by the data set's own equivalence",
    fields=(),
    prompts=each(lambda row, request: templated(request, METAMATH_PROMPT, problem_and_solution(row)[0])),
    judge=judge_metamath,
    max_new_tokens=NEW_TOKENS,
    stop=METAMATH_STOP,
    source="DigitalLearningGmbH/MATH-lighteval",
    also=("hendrycks",),
    check=problem_and_solution,
)


def _prepare(request: Request) -> Prepared:
    missing = unverifiable()
    told = "verified is by math-verify" if missing is None else f"verified is missing ({missing})"
    protocol = replace(_METAMATH, description=f"{_METAMATH.description}; {told}")
    if missing is None:
        protocol = replace(protocol, judge=_judge_verified, also=(*protocol.also, "verified"))
    prepared = protocol.prepare(request)
    return replace(prepared, identity=prepared.identity | {"verified": missing is None})


TASKS = (Task(_METAMATH.name, _prepare, heeds=_METAMATH.heeds),)
