import json
from pathlib import Path

import lm_eval
import pytest
import yaml
from conftest import llama

import bonetune
from bonetune.data import PAPER_PROMPT
from bonetune.errors import InputError
from bonetune.evaluation import humaneval
from bonetune.evaluation.humaneval import check_program, extract_program, instruction, judge, prompt_of
from bonetune.evaluation.sandbox import Outcome
from bonetune.evaluation.task import Request
from bonetune.models import Answer, Loaded

SQUARES = {
    "task_id": "Test/0",
    "prompt": 'from typing import List\n\n\ndef squares(numbers: List[int]) -> List[int]:\n    """The square of each.\n'
    '    >>> squares([1, 2])\n    [1, 4]\n    """\n',
    "entry_point": "squares",
    "canonical_solution": "    return [n * n for n in numbers]\n",
    "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate([]) == []\n"
    "    assert candidate([1, -3]) == [1, 9]\n",
}
DECODE = {
    "task_id": "Test/1",
    "prompt": "import math\n\n\ndef shift(text: str) -> str:\n    return text[1:] + text[:1]\n\n\n"
    "def unshift(text: str) -> str:\n    '''What was shifted.'''\n",
    "entry_point": "unshift",
    "canonical_solution": "    return text[-1:] + text[:-1]\n",
    "test": "def check(candidate):\n    for text in ('', 'a', 'abc'):\n        assert candidate(shift(text)) == text\n",
}
ROWS = [SQUARES, DECODE]

WHOLE = "def squares(numbers: List[int]) -> List[int]:\n    return [n * n for n in numbers]"
CUBES = "def cubes(n):\n    return 8"
LOOP = "    out = []\n    for n in numbers:\n        out.append(n * n)\n    return out"
LOOP_WHOLE = f"def squares(numbers):\n{LOOP}"


def fenced(code, language="python"):
    return f"```{language}\n{code}\n```"


# Answers to the instruction to write `squares` that are right.
RIGHT = {
    "whole": fenced(WHOLE),
    "with prose": f"Sure! Here is the function:\n\n{fenced(WHOLE)}\n\nIt squares each number, `n * n`.",
    "no fence": WHOLE,
    "no fence, prose": f"Sure! from here on it is simple:\n\n{WHOLE}\n\nThis function squares each number.\nDone",
    "no fence, imports": f"The answer:\nimport math\nfrom typing import List\n\n{WHOLE}\n\nThat is it.",
    "unclosed": f"Here:\n```python\n{WHOLE}",
    "unclosed and torn": f"```python\n{WHOLE}\n\ndef torn(numbers):\n    for n in (1, 2",
    "closed at the line's end": f"```python\n{WHOLE}```",
    "only closed": f"{WHOLE}\n```\nThe function squares each number.",
    "no language": fenced(WHOLE, ""),
    "odd label": fenced(WHOLE, 'python3 title="a.py"'),
    "windows": f"Here:\n{fenced(WHOLE)}\n".replace("\n", "\r\n"),
    "old macintosh": fenced(WHOLE).replace("\n", "\r"),
    "blank lines": f"\n\n\n{fenced(WHOLE)}\n\n\n",
    "prompt repeated": fenced(SQUARES["prompt"] + LOOP),
    "indented": fenced("\n".join(f"    {line}" for line in WHOLE.split("\n"))),
    "tabs": fenced(WHOLE.replace("    ", "\t")),
    "body": fenced(LOOP),
    "body, no fence": f"{LOOP}\n",
    "body, prose behind": f"{LOOP}\n\nThis loops over the numbers.\nDone",
    "body without indentation": fenced("\n".join(line[4:] for line in LOOP.split("\n"))),
    "body whose first line lost its indentation": LOOP.strip(),
    "body in tabs": fenced(LOOP.replace("    ", "\t")),
    "body of one line": "return [n * n for n in numbers]",
    "body, only closed": f"{LOOP}\n```\nEnd of the function.",
    "body, main guard": f"{LOOP}\n\nif __name__ == '__main__':\n    print(squares([1]))",
    "body, helper": "    return [square(n) for n in numbers]\n\n\ndef square(n):\n    return n * n\n\nsquares(3)",
    "main guard": fenced(f"{WHOLE}\n\nif __name__ == '__main__':\n    print(squares([int(x) for x in input().split()]))"),
    "examples": fenced(f"{WHOLE}\n\nprint(squares([2]))\nassert squares([2]) == [5]\nn = int(input())\nraise SystemExit"),
    "helper before": fenced(f"def square(n):\n    return n * n\n\n{WHOLE.replace('n * n', 'square(n)')}"),
    "helper behind": fenced(f"{WHOLE.replace('n * n', 'square(n)')}\n\n@staticmethod\ndef square(n):\n    return n * n"),
    "constant before": f"So:\nPOWER = 2\n{WHOLE.replace('n * n', 'n**POWER')}",
    "constant behind": fenced(f"{WHOLE.replace('n * n', 'n**POWER')}\n\nPOWER = 2\nprint(squares([1]))"),
    "constant between": fenced(
        f"{WHOLE.replace('n * n', 'square(n)')}\n\nPOWER: int = 2\n\ndef square(n):\n    return n**POWER"
    ),
    "constants of constants": fenced(f"{WHOLE.replace('n * n', 'n**POWER')}\n\nONE, TWO = 1, 2\nPOWER = ONE\nPOWER += ONE"),
    "default behind": fenced(f"{WHOLE.replace('n * n', 'square(n)')}\n\nP = 2\n\ndef square(n, p=P):\n    return n**p"),
    "table behind": fenced(f"{WHOLE.replace('n * n', 'T[abs(n)]')}\n\nT = {{}}\nT[1] = 1\nT[3] = 9"),
    "local names behind": fenced(f"{LOOP_WHOLE}\n\nnumbers = input()\nout = squares(numbers)"),
    "a program behind": fenced(f"{WHOLE}\n\ndef main():\n    print(squares(given))\n\ngiven = input()\nmain()"),
    "lambda": fenced("squares = lambda numbers: [n * n for n in numbers]\nprint(squares(input()))"),
    "typed lambda": fenced("from typing import Callable\nsquares: Callable = lambda numbers: [n * n for n in numbers]"),
    "lambda, helper": fenced("squares = lambda a: [f(n) for n in a]\nP = 2\ndef f(n):\n    return n**P"),
    "lambda, no fence": "It is:\nsquares = lambda numbers: [n * n for n in numbers]\n\nDone.",
    "another name": fenced("def f(numbers):\n    return [n * n for n in numbers]\n\nsquares = f"),
    "partial": fenced("from functools import partial\nsquares = partial(lambda p, a: [n**p for n in a], 2)"),
    "use first, of its own name": f"{fenced('squares = squares([1, 2])')}\nCode:\n{fenced(WHOLE)}",
    "body with its own name": fenced("squares = list(n * n for n in numbers)\nreturn squares"),
    "decorated": fenced("import functools\n\n@functools.wraps(len)\n" + WHOLE),
    "future": fenced(f"from __future__ import annotations\n{WHOLE.replace('List[int]', 'Unknown[int]')}"),
    "own types": fenced("import typing as t\n\n" + WHOLE.replace("List[int]", "t.Sequence[int]")),
    "stub first": f"The task:\n{fenced(SQUARES['prompt'] + '    pass')}\nThe answer:\n{fenced(WHOLE)}",
    "stub first, in one block": fenced(f"def squares(numbers):\n    ...\n\n{WHOLE}"),
    "use first": f"Use it like this:\n{fenced('print(squares([1, 2]))')}\nCode:\n{fenced(WHOLE)}",
    "shell first": f"{fenced('pip install numpy', 'bash')}\n{fenced(WHOLE)}",
    "other function first": f"{fenced(CUBES)}\n{fenced(WHOLE)}",
    "another answer behind": f"{fenced(WHOLE)}\nOr, shorter and wrong:\n{fenced(CUBES.replace('cubes', 'squares'))}",
    "repeated until torn": "\n\n".join([WHOLE] * 40) + "\n\ndef squares(numbers: List[int]) -> List[int]:\n    return [n",
    "next question": f"{fenced(WHOLE)}\n\n### Instruction:\nNow cubes.\n\n### Response:\n{fenced(CUBES)}",
    "strange escapes": fenced("import re\n" + WHOLE.replace("return", "re.match('\\d', '')\n    return")),
    "unicode": "\u2705 \u201cHere\u201d:\n" + fenced("# \u00e9\U0001f600\n" + WHOLE),
    "async helper": fenced(f"{WHOLE}\n\nasync def later():\n    return 1"),
}  # fmt: skip

WRONG = {
    "empty": "",
    "blank": " \n\n\t\n",
    "prose": "I cannot do that.\nreturn to sender",
    "python that is prose": "Done",
    "other function": fenced("def cubes(numbers):\n    return [n * n for n in numbers]"),
    "method": fenced("class Solution:\n    def squares(self, numbers):\n        return [n * n for n in numbers]"),
    "wrong": fenced(WHOLE.replace("n * n", "n + n")),
    "stub": fenced(SQUARES["prompt"] + "    pass"),
    "torn": fenced("def squares(numbers):\n    return [n *"),
    "torn signature": "def squares(",
    "result": fenced("squares = [1, 9]"),
    "result of itself": fenced("squares = squares([1, 2])"),
    "no sense": fenced("squares = ="),
    "null byte": fenced(WHOLE + "\0"),
    "half a character": fenced("def squares(numbers):\n    return '\udc80'"),
    "empty fences": "``````\n```\n```python\n```",
    "leaves": fenced("import os\nos._exit(0)\n" + WHOLE),
    "raises": fenced("def squares(numbers):\n    raise NotImplementedError"),
    "nested": "(" * 3000,
}


@pytest.mark.parametrize("answer", RIGHT)
def test_right_answers_pass(answer):
    program, outcome = judge(SQUARES, RIGHT[answer], "instruct")
    assert outcome == Outcome("passed"), program
    assert "input()" not in program


@pytest.mark.parametrize("answer", WRONG)
def test_wrong_answers_fail(answer):
    program, outcome = judge(SQUARES, WRONG[answer], "instruct")
    assert outcome.status == "failed", program


@pytest.mark.parametrize("row", ROWS)
def test_the_reference_passes_however_it_is_put(row):
    body = row["canonical_solution"]
    head = row["prompt"][row["prompt"].index(f"def {row['entry_point']}") :]
    for answer in (body, fenced(body), fenced(row["prompt"] + body), fenced(head + body), head + body, body.strip()):
        assert judge(row, answer, "instruct")[1] == Outcome("passed"), answer
    assert judge(row, body, "completion")[1] == Outcome("passed")


def test_what_the_prompt_has_before_its_function_is_kept_once():
    answer = fenced("def unshift(text):\n    return text[-1:] + text[:-1]")
    program = extract_program(DECODE, answer, "instruct")
    assert program.startswith("import math\n\n\ndef shift(text: str) -> str:\n")
    assert program.count("def unshift") == program.count("def shift") == 1
    assert "What was shifted" not in program


@pytest.mark.parametrize("end", humaneval.STOP)
def test_a_completion_ends_at_each_stop(end):
    output = f"{LOOP}\n{end} more\nraise SystemExit"
    assert extract_program(SQUARES, output, "completion") == f"{SQUARES['prompt']}{LOOP}\n"
    assert judge(SQUARES, output, "completion")[1] == Outcome("passed")


@pytest.mark.parametrize("output", [LOOP, LOOP.replace("\n", "\r\n"), "", "```python\nx\n```", "\treturn 1", LOOP[4:]])
def test_a_completion_is_taken_as_it_is(output):
    assert extract_program(SQUARES, output, "completion") == SQUARES["prompt"] + output


def test_stops_and_program_are_the_harnesss():
    folder = Path(lm_eval.__file__).parent / "tasks/humaneval"
    theirs = yaml.safe_load((folder / "humaneval.yaml").read_text().replace("!function", ""))
    assert tuple(theirs["generation_kwargs"]["until"]) == humaneval.STOP
    assert theirs["generation_kwargs"]["max_gen_toks"] == humaneval.NEW_TOKENS
    assert theirs["doc_to_text"] == "{{prompt}}"
    assert prompt_of(SQUARES, "completion") == SQUARES["prompt"]
    target = theirs["doc_to_target"].replace("{{test}}", SQUARES["test"]).replace("{{entry_point}}", "squares")
    # its metric, code_eval, joins what build_predictions makes and the target by a new line
    assert check_program(SQUARES, "the program") == f"the program\n{target}"


def test_the_instruction_shows_the_function_in_the_papers_template():
    prompt = prompt_of(SQUARES, "instruct")
    before, after = PAPER_PROMPT.split("{instruction}")
    assert prompt == before + instruction(SQUARES) + after
    assert fenced(SQUARES["prompt"].strip()) in prompt


def test_a_prompt_with_braces_is_shown_as_it_is():
    row = SQUARES | {"prompt": "def squares(n):\n    '''{prompt} {instruction} {0}'''\n"}
    assert "'''{prompt} {instruction} {0}'''" in prompt_of(row, "instruct")


@pytest.mark.parametrize("mode", ["completion", "instruct"])
def test_a_row_without_its_function(mode):
    row = SQUARES | {"entry_point": "cubes"}
    with pytest.raises(InputError, match="The prompt of Test/0 has no 'def cubes', which its entry_point names"):
        extract_program(row, "", mode)
    with pytest.raises(InputError, match="has no 'def cubes'"):
        humaneval.check_row(row)
    humaneval.check_row(SQUARES)


def test_limits_are_handed_on():
    answer = fenced("def squares(numbers):\n    while True: pass")
    assert judge(SQUARES, answer, "instruct", seconds=1)[1].status == "timeout"
    deaf = "def squares(numbers):\n    import signal\n    signal.signal(signal.SIGXCPU, signal.SIG_IGN)\n    while True: pass"
    assert judge(SQUARES, fenced(deaf), "instruct", seconds=1)[1].status == "timeout"
    answer = fenced("def squares(numbers):\n    bytearray(2**28)\n    return [n * n for n in numbers]")
    assert judge(SQUARES, answer, "instruct", memory_bytes=2**27)[1] == Outcome("failed", "MemoryError")
    assert judge(SQUARES, answer, "instruct")[1] == Outcome("passed")


@pytest.mark.parametrize(
    ("held", "told"),
    [
        (("privileges", "Landlock", "seccomp"), "pass@1 of programs run in a sandbox, 10 s of processor time each"),
        (("privileges", "seccomp"), "run in a sandbox without Landlock (files can be read), 10 s of processor time each"),
        (("privileges", "Landlock"), "run without a sandbox (--unsafe-code), 10 s of processor time each"),
        ((), "run without a sandbox (--unsafe-code), 10 s of processor time each"),
    ],
)
@pytest.mark.parametrize("task", humaneval.TASKS)
def test_the_protocol_says_what_holds_programs_back(task, held, told, tmp_path, tokenizer, monkeypatch):
    (tmp_path / "rows.jsonl").write_text(json.dumps(SQUARES) + "\n")
    monkeypatch.setattr(humaneval, "layers", lambda **settings: held)
    monkeypatch.setattr("bonetune.evaluation.questions.generate_batches", lambda *_, **__: [{0: Answer("", True)}])
    (result,) = bonetune.evaluate(Loaded(llama(), tokenizer, "m"), [task.name], data=str(tmp_path / "rows.jsonl"))
    assert told in result.protocol


def test_records_of_a_sandbox_do_not_go_on_in_another(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "rows.jsonl").write_text(json.dumps(SQUARES) + "\n")
    monkeypatch.setattr("bonetune.evaluation.questions.generate_batches", lambda *_, **__: [{0: Answer("", True)}])
    told = {"data": str(tmp_path / "rows.jsonl"), "output_dir": str(tmp_path / "out")}
    loaded = Loaded(llama(), tokenizer, "m")

    def evaluated(*held, **settings):
        monkeypatch.setattr(humaneval, "layers", lambda **_: held)
        return bonetune.evaluate(loaded, ["humaneval"], **told, **settings)

    whole = evaluated("privileges", "Landlock", "seccomp")
    assert evaluated("privileges", "Landlock", "seccomp", unsafe_code=True, resume=True) == whole  # which takes nothing away
    for held in (("privileges", "seccomp"), ("privileges",)):
        with pytest.raises(
            InputError, match=r"made with other settings \(held_back \(\['privileges', 'Landlock', 'seccomp'\], now"
        ):
            evaluated(*held, unsafe_code=True, resume=True)


def test_whether_programs_can_be_held_back_is_known_before_the_rows_are_read(monkeypatch):
    def refused(**settings):
        raise InputError("Programs cannot be held back.")

    monkeypatch.setattr(humaneval, "layers", refused)
    with pytest.raises(InputError, match="cannot be held back"):
        humaneval.TASKS[0].prepare(Request(data="nowhere.jsonl"))
