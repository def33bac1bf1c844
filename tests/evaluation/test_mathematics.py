import signal
import sys
import threading
import warnings

import math_verify
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from bonetune.errors import InputError
from bonetune.evaluation import mathematics

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its "\%" is an invalid escape
    from lm_eval.tasks.hendrycks_math import utils as hendrycks  # MetaMath's util.py has the same rules

PIECES = st.sampled_from(
    [
        *"0123456789.,/=+-$% \n{}()xk_^\\\t", "0.5", "1/2", "01/2", "-1/2", "1_0", " .", "{.", "k = ", "x=", "\\pi", "\u0663",
        "\\frac", "\\frac12", "\\frac1{72}", "\\dfrac{1}{2}", "\\tfrac", "tdfrac", "\\sqrt", "\\sqrt3", "\\sqrt 3", "\\sqrt{2}",
        "\\text{ cm}", "\\text{cm}", "\\left(", "\\right)", "\\leftarrow", "^\\circ", "^{\\circ}", "\\%", "\\$", "\\!", "\\\\",
    ]
)  # fmt: skip
ANSWERS = st.lists(PIECES, max_size=8).map("".join)


def unless(normalize, text, errors):
    """A text normalized; None if that fails."""
    try:
        return normalize(text)
    except errors:
        return None


@settings(max_examples=3000, deadline=None)
@given(ANSWERS)
@example("")
@example(".5")
@example("x=")
@example("\\frac")
@example("\\frac1\\frac")
@example("\\frac\\frac1")
@example("\\frac{")
@example("\\sqrt\\sqrt3")
@example("5\\text{ cm}\\text{ m}")
@example("x/2")
@example("1_0/2")
@example("1" * 5000 + "/2")
def test_answers_are_normalized_as_in_the_original(text):
    expected = unless(hendrycks.strip_string, text, (AssertionError, IndexError, ValueError))
    assert unless(mathematics.normalized, text, ValueError) == expected


@settings(max_examples=1000, deadline=None)
@given(ANSWERS, ANSWERS)
@example("x/2", "x/2")
@example("x/2", "x / 2")
def test_answers_are_equivalent_as_in_the_original(one, other):
    assert mathematics.equivalent(one, other) is hendrycks.is_equiv(one, other)
    assert mathematics.equivalent(one, one) is True


@settings(max_examples=1000, deadline=None)
@given(ANSWERS, ANSWERS)
@example("x/2", "x / 2")
@example("1" * 5000 + "/2", "1" * 5000 + " /2")
@example("10%", "10")
def test_answers_are_equivalent_by_the_data_sets_own_rules(one, other):
    """Its code differs from MetaMath's in what one function does with what is no number."""
    with_numbers = hendrycks.fix_a_slash_b

    def fix_a_slash_b(text):
        try:
            return with_numbers(text)
        except ValueError:
            return text

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hendrycks, "fix_a_slash_b", fix_a_slash_b)
        assert mathematics.equivalent(one, other, "hendrycks") is hendrycks.is_equiv(one, other)
        assert mathematics.equivalent(one, one, "hendrycks") is True


@pytest.mark.parametrize(
    ("one", "other", "metamath", "hendrycks"),
    [
        ("x/2", "x / 2", False, True), ("\\pi/2", "\\pi /2", False, True), ("\\dfrac{x}{2}", "x/2", False, False),
        ("1/2", "\\frac12", True, True), ("10%", "10", False, False), ("10\\%", "10", True, True),
        ("5\\text{ cm}\\text{ m}", "5", False, False),
    ],
)  # fmt: skip
def test_where_the_two_rules_differ(one, other, metamath, hendrycks):
    assert mathematics.equivalent(one, other) is metamath
    assert mathematics.equivalent(one, other, "hendrycks") is hendrycks


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("\\dfrac12", "\\frac{1}{2}", True), ("0.5", "\\tfrac{1}{2}", True), ("3/4", "\\frac{3}{4}", True), (".5", "0.5", True),
        ("x = 5", "5", True), ("90^\\circ", "90", True), ("10\\%", "10", True), ("\\$5", "5", True),
        ("5\\text{ cm}", "5", True),
        ("\\left( 1, 2 \\right)", "(1,2)", True), ("\\sqrt3", "\\sqrt{3}", True), ("0.25", "\\frac{1}{4}", False),
        ("10%", "10", False), ("abc = 5", "5", False), ("\\sqrt 3", "\\sqrt{3}", False), ("2/4", "1/2", False),
        ("1+x", "x+1", False), ("x/2", "x / 2", False), ("1,000", "1000", False),
    ],
)  # fmt: skip
def test_rules_of_equivalence(one, other, same):
    assert mathematics.equivalent(one, other) is same


def process_results(completion, solution):
    """The steps of MetaMath's last_boxed_only_string, remove_boxed and process_results, one by one."""
    place = solution.rfind("\\boxed")
    place = place if place >= 0 else solution.rfind("\\fbox")
    depth, end, reference = 0, place if place >= 0 else len(solution), None
    while end < len(solution):
        depth += {"{": 1, "}": -1}.get(solution[end], 0)
        if solution[end] == "}" and depth == 0:
            boxed = solution[place : end + 1]
            reference = boxed[7:-1] if boxed.startswith("\\boxed{") else None
            break
        end += 1
    parts = completion.split("The answer is: ")
    if len(parts) < 2:
        return False
    answer = parts[-1].split(".\n")[0].strip()
    if len(answer) > 0 and answer[-1] == ".":
        answer = answer[:-1]
    return hendrycks.is_equiv(answer.strip(), reference)


TEXTS = st.lists(
    st.sampled_from(
        [
            "\\boxed{", "\\boxed", "\\boxed ", "\\fbox{", "{", "}", "}", "\\{", "$", "1", "2", "x", " ", ".", ".\n", "..", "\n",
            "The answer is: ", "The answer is ", "\\frac12", "\\frac{1}{2}", "0.5",
        ]
    ),
    max_size=10,
).map("".join)  # fmt: skip


@settings(max_examples=2000, deadline=None)
@given(TEXTS.map(lambda text: f"So. The answer is: {text}"), TEXTS.map(lambda text: f"$\\boxed{{1}}$ {text}"))
@example("The answer is 1", "\\boxed{1}")
@example("", "\\boxed{}")
@example("The answer is: ", "\\boxed{}")
def test_judged_as_by_metamath(output, solution):
    assume(mathematics.last_boxed(solution) is not None)
    judged = mathematics.judge_metamath(output, {"problem": "?", "solution": solution})
    assert judged["correct"] is process_results(output, solution)


@pytest.mark.parametrize(
    ("output", "read"),
    [
        ("The answer is: 5.", "5"),
        ("The answer is: 5.\nThe end.", "5"),
        ("The answer is: 5\nThe end.", "5\nThe end"),
        ("The answer is: 5..", "5."),
        ("The answer is: 4. The answer is:  $5$ . ", "$5$"),
        ("The answer is 5", None),
        ("\\boxed{5}", None),
        ("The answer is: ", ""),
    ],
)
def test_what_metamath_reads(output, read):
    assert mathematics.metamath_text(output) == read


@pytest.mark.parametrize(
    ("text", "content", "by_metamath"),
    [
        ("so $\\boxed{5}$.", "5", "5"),
        ("\\boxed{4} then \\boxed{\\frac{1}{\\sqrt{2}}}, {x}", "\\frac{1}{\\sqrt{2}}", "\\frac{1}{\\sqrt{2}}"),
        ("\\boxed{\\boxed{5}}", "5", "5"),
        ("\\boxed{\\text{a $5$ note}}", "\\text{a $5$ note}", "\\text{a $5$ note}"),
        ("\\fbox{5}", "5", None),
        ("\\fbox{5} \\boxed{4}", "4", "4"),
        ("\\boxed{4} \\fbox{5}", "4", "4"),
        ("$\\boxed 5$ is {it}", "5", None),
        ("\\boxed {5}", "5", None),
        ("\\boxed{}", "", ""),
        ("\\boxed{5", None, None),
        ("\\boxed $", None, None),
        ("\\boxed", None, None),
        ("5", None, None),
        ("", None, None),
    ],
)
def test_boxes(text, content, by_metamath):
    assert mathematics.last_boxed(text) == content
    assert mathematics.metamath_reference_text(text) == by_metamath


@settings(deadline=None)
@given(TEXTS)
def test_boxes_with_braces_are_the_originals(text):
    assume("\\boxed " not in text)
    boxed = hendrycks.last_boxed_only_string(text)
    if boxed is not None and boxed.startswith("\\boxed{"):
        assert mathematics.last_boxed(text) == hendrycks.remove_boxed(boxed)


@pytest.mark.parametrize("fields", [("problem", "solution"), ("instruction", "output")])
def test_rows_of_both_names(fields):
    row = dict(zip(fields, ("Q?", "$\\boxed{5}$"), strict=True))
    assert mathematics.problem_and_solution(row) == ("Q?", "$\\boxed{5}$")
    record = {"answer": "5", "expected": "5", "correct": True, "hendrycks": True}
    assert mathematics.judge_metamath("The answer is: 5.", row) == record


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"problem": "Q?"}, "problem and solution or instruction and output; this one has the fields problem"),
        ({}, r"the fields \(none\)"),
        ({"problem": "Q?", "solution": None}, "have the texts"),
        ({"problem": "Q?", "solution": "It is 5."}, r"The solution 'It is 5.' has no answer in \\boxed"),
    ],
)
def test_bad_rows(row, message):
    with pytest.raises(InputError, match=message):
        mathematics.problem_and_solution(row)


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [
        ("2\\sqrt{3}", "\\sqrt{12}", True), ("x+1", "1+x", True), ("0.75", "\\frac{3}{4}", True), ("(1,2)", "(1, 2)", True),
        ("[2,5)", "[2,5)", True), ("(2,5)", "[2,5)", False), ("x=5", "5", True), ("1,000", "1000", True), ("$5$", "5", True),
        ("\\text{(A)}", "\\text{(B)}", False), ("6", "5", False), ("", "5", False), ("\\frac{", "5", False),
    ],
)  # fmt: skip
def test_math_verify_compares_as_mathematics(answer, expected, same):
    output, solution = f"First \\boxed{{7}}. The answer is: {answer}.", f"Not \\boxed{{8}}, but $\\boxed{{{expected}}}$."
    assert mathematics.verify(output, solution) is same
    boxes = (math_verify.parse(f"$\\boxed{{{text}}}$") for text in (expected, answer))
    assert math_verify.verify(*boxes) is same


@pytest.mark.parametrize(
    ("output", "same"), [("so $\\boxed{\\frac{1}{2}}$", True), ("The final answer is $0.5$.", True), ("no", False), ("", False)]
)
def test_math_verify_reads_outputs_of_other_forms(output, same):
    assert mathematics.verify(output, "so \\boxed{0.5}") is same
    assert math_verify.verify(math_verify.parse("\\boxed{0.5}"), math_verify.parse(output)) is same


def test_math_verify_gives_up_after_a_while(caplog):
    assert mathematics.verify("The answer is: 9^{9^{9^{9}}}", "\\boxed{3}") is False
    assert "Timeout" in caplog.text


def test_math_verify_needs_the_main_thread():
    found = []

    def call():
        try:
            mathematics.verify("The answer is: 5", "\\boxed{5}")
        except InputError as error:
            found.append(str(error))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert "only the main thread" in found[0]


def test_math_verify_needs_alarms(monkeypatch):
    monkeypatch.delattr(signal, "SIGALRM")
    with pytest.raises(InputError, match="by a signal"):
        mathematics.verify("The answer is: 5", "\\boxed{5}")


def test_math_verify_needs_a_box():
    with pytest.raises(InputError, match="'It is 5' has no answer in"):
        mathematics.verify("The answer is: 5", "It is 5")


def test_math_verify_may_be_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(InputError, match=r"pip install 'bonetune\[math\]'"):
        mathematics.verify("The answer is: 5", "\\boxed{5}")
