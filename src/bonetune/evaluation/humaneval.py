"""HumanEval (arXiv 2107.03374): how its functions are asked for, what program an answer is, and whether it passes the tests.

A row has the public file's fields: `task_id`, `prompt` (imports, perhaps other functions, then the head and the docstring of
the function `entry_point`) and `test`, which defines `check`.
"""

import ast
import re
import symtable
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from bonetune.data import PAPER_PROMPT
from bonetune.errors import InputError
from bonetune.evaluation.questions import Protocol, templated
from bonetune.evaluation.result import Record
from bonetune.evaluation.sandbox import Outcome, layers, run_program
from bonetune.evaluation.sandbox_child import LANDLOCK, SECCOMP
from bonetune.evaluation.task import Prepared, Request, Task
from bonetune.models import cut

FIELDS = ("task_id", "prompt", "entry_point", "test")
# lm-evaluation-harness 0.4.13, task humaneval: the prompt as it is, greedy, up to these. It gives a program 3 seconds.
STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
NEW_TOKENS = 1024
# Put in PAPER_PROMPT for models trained on instructions. The wording is bonetune's own.
INSTRUCTION = "Complete this Python function. Answer with the whole function in a code block.\n\n```python\n{prompt}\n```"

Mode = Literal["completion", "instruct"]

_FENCED = re.compile(r"```[^\n`]*\n(.*?)(?:^[ \t]*```|```[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
_STATEMENT = re.compile(r"(?:import|from|async|def|class)\s|@|[A-Za-z_]\w*\s*[:=(.[]")
_FUTURE = re.compile(r"^from __future__ import .*\n?", re.MULTILINE)
_HEADS = 20  # how many definitions of one function are looked at: some models repeat themselves

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Assignment = ast.Assign | ast.AnnAssign | ast.AugAssign
_Found = Callable[[ast.Module, str], ast.stmt | None]  # a module's definition of a name


def check_row(row: Mapping[str, Any]) -> None:
    """Raise `InputError` if a row's prompt does not end with the function it asks for."""
    _before_function(row)


def prompt_of(row: Mapping[str, Any], mode: Mode) -> str:
    """What a model is given: the beginning of the function, or an instruction in the papers' template that shows it."""
    return row["prompt"] if mode == "completion" else PAPER_PROMPT.replace("{instruction}", instruction(row))


def instruction(row: Mapping[str, Any]) -> str:
    """The instruction to complete a row's function."""
    return INSTRUCTION.replace("{prompt}", row["prompt"].strip())


def extract_program(row: Mapping[str, Any], output: str, mode: Mode) -> str:
    """The program that an answer is, without the tests.

    Of a completion it is the prompt and the answer up to the first of `STOP`, sign by sign, as in the harness.

    Of an answer to the instruction, each fenced block is looked at, then what stands before the first, then the whole. The
    first is taken that defines the function with more than a docstring, else the first that assigns its name something to
    call: from the first line on with which all is Python, and behind the function only imports, classes, other functions, and
    the assignments that one of these needs, so that no example runs. What the prompt has before its function is put before. If
    none defines it, the first is taken that returns or yields something when it is put behind the prompt as the function's
    body, with its indentation or without. If there is none either, it is the prompt.

    Raises:
        InputError: the row's prompt does not have its function.
    """
    prompt, before = row["prompt"], _before_function(row)
    if mode == "completion":
        return prompt + cut(output, STOP)
    text = re.sub(r"\r\n?", "\n", output)
    candidates = [*_FENCED.findall(text), text.partition("```")[0], text]
    for found in (_function, _assigned):
        for candidate in candidates:
            definition = _definition(textwrap.dedent(candidate).split("\n"), row["entry_point"], found)
            if definition is not None:
                future = "".join(_FUTURE.findall(definition))  # must stand before all else
                return future + before + _FUTURE.sub("", definition)
    for candidate in candidates:
        body = _body(candidate, prompt, before, row["entry_point"])
        if body is not None:
            return body
    return prompt


def check_program(row: Mapping[str, Any], program: str) -> str:
    """A program with a row's tests behind it, and the call that runs them."""
    return f"{program}\n{row['test']}\ncheck({row['entry_point']})"


def judge(
    row: Mapping[str, Any], output: str, mode: Mode, *, seconds: float = 10.0, memory_bytes: int = 2**29, unsafe: bool = False
) -> tuple[str, Outcome]:
    """The program that an answer is, and how it ended when it was run with the row's tests, by `run_program`.

    Raises:
        InputError: the row's prompt does not have its function, or programs cannot be held back on this system.
    """
    program = extract_program(row, output, mode)
    outcome = run_program(check_program(row, program), seconds=seconds, memory_bytes=memory_bytes, unsafe=unsafe)
    return program, outcome


def _before_function(row: Mapping[str, Any]) -> str:
    """What a row's prompt has before the function that it asks for."""
    prompt, name = row["prompt"], row["entry_point"]
    heads = list(re.finditer(rf"^(?:async )?def {re.escape(name)}\b", prompt, re.MULTILINE))
    if not heads:
        raise InputError(f"The prompt of {row['task_id']} has no 'def {name}', which its entry_point names: write it there.")
    return prompt[: heads[-1].start()]


def _definition(lines: list[str], name: str, found: _Found) -> str | None:
    """The statements among some lines that define a function; None if it is not defined, or has no body."""
    head_of = re.compile(rf"(?:async )?def {re.escape(name)}\b|{re.escape(name)}\s*(?::[^=]*)?=(?!=)")
    heads = [number for number, line in enumerate(lines) if head_of.match(line)]
    for head in heads[:_HEADS]:
        whole, tree = _python_of(lines[head:])
        if found(tree, name) is None:
            continue
        for start in range(head):
            if _STATEMENT.match(lines[start]):
                longer = lines[start : head + len(whole)]
                told, longer_tree = _python_of(longer)
                if len(told) == len(longer):
                    return _without_examples(longer, longer_tree, name, found)
        return _without_examples(whole, tree, name, found)
    return None


def _body(text: str, prompt: str, before: str, name: str) -> str | None:
    """A prompt with a text behind it as the function's body; None if it returns nothing so."""
    found = re.search(r"\n([ \t]+)\S", prompt[len(before) :])
    indent = found[1] if found else "    "
    text = re.sub(r"^\t+", lambda tabs: indent * len(tabs[0]), text.strip("\n"), flags=re.MULTILINE)
    best, longest = None, 0
    # as it is; with the indentation that its first line has lost; with the one that all lines lack
    for body in (text, indent + text, textwrap.indent(textwrap.dedent(text), indent)):
        lines, tree = _python_of(f"{prompt.rstrip()}\n{body}".split("\n"))
        function = _function(tree, name)
        if function is None or not any(isinstance(node, ast.Return | ast.Yield) for node in ast.walk(function)):
            continue
        if _last_line(function) > longest:
            best, longest = _without_examples(lines, tree, name, _function), _last_line(function)
    return best


def _without_examples(lines: list[str], tree: ast.Module, name: str, found: _Found) -> str:
    """The lines up to the function's end; behind it the imports, classes, other functions, and the assignments they need."""
    function = found(tree, name)
    assert function is not None
    place = tree.body.index(function) + 1
    behind = [node for node in tree.body[place:] if name not in _bound(node)]
    kept = {node: isinstance(node, _Function | ast.ClassDef | ast.Import | ast.ImportFrom) for node in behind}
    needed = set().union(*map(_reads, tree.body[:place]), *(_reads(node, called=False) for node in behind if kept[node]))
    # what is only defined reads its names once something needed calls it
    waiting = [node for node in behind if isinstance(node, _Function | ast.ClassDef | _Assignment)]
    while reached := [node for node in waiting if _bound(node) & needed]:
        needed |= set().union(*map(_reads, reached))
        kept |= dict.fromkeys(reached, True)
        waiting = [node for node in waiting if node not in reached]
    text = [*lines[: _last_line(function)], ""]
    for node in filter(kept.__getitem__, behind):
        first = min(part.lineno for part in (*getattr(node, "decorator_list", ()), node))
        text += [*lines[first - 1 : _last_line(node)], ""]
    return "\n".join(text)


def _bound(node: ast.stmt) -> set[str]:
    """The names that a definition or an assignment gives something; of an assignment to a part, that of the whole."""
    if isinstance(node, _Function | ast.ClassDef):
        return {node.name}
    if not isinstance(node, _Assignment):
        return set()
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}


def _reads(node: ast.stmt, *, called: bool = True) -> set[str]:
    """The module's names that a statement reads, with what it defines called or not."""
    try:
        tables, found = [symtable.symtable(ast.unparse(node), "program", "exec")], set[str]()
    except (SyntaxError, ValueError, RecursionError):
        return set()
    while tables:
        table = tables.pop()
        here = [symbol for symbol in table.get_symbols() if symbol.is_referenced()]
        found |= {symbol.get_name() for symbol in here if table.get_type() == "module" or symbol.is_global()}
        tables += [child for child in table.get_children() if called or child.get_type() == "class"]
    return found


def _function(tree: ast.Module, name: str) -> _Function | None:
    """The first definition of a function that has more than a docstring, `pass` or an ellipsis."""
    for node in tree.body:
        if isinstance(node, _Function) and node.name == name:
            for part in node.body:
                if not isinstance(part, ast.Pass) and not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant)):
                    return node
    return None


def _assigned(tree: ast.Module, name: str) -> ast.stmt | None:
    """The first assignment to a name of a lambda, a call or something with a name, unless it reads that name itself."""
    if not _compiles(tree):  # a function's body, with a return
        return None
    for node in tree.body:
        callable_value = isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(
            node.value, ast.Lambda | ast.Call | ast.Name | ast.Attribute
        )
        if callable_value and name in _bound(node) - _reads(node, called=False):
            return node
    return None


def _compiles(tree: ast.Module) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(tree, "program", "exec")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    return True


def _last_line(node: ast.stmt) -> int:
    return node.end_lineno or node.lineno


def _python_of(lines: list[str]) -> tuple[list[str], ast.Module]:
    """The lines up to one with which they are no longer Python, and what they say."""
    while True:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of strange escapes and comparisons
                return lines, ast.parse("\n".join(lines))
        except SyntaxError as error:
            lines = lines[: min(error.lineno or len(lines), len(lines)) - 1]
        except (ValueError, MemoryError, RecursionError):
            lines = lines[:-1]


_DESCRIPTIONS = {
    "completion": "lm-evaluation-harness's prompt, the function's beginning, and its stop texts",
    "instruct": "the papers' prompt with the instruction to complete the function",
}
SECONDS = 10.0


def _prompts(mode: Mode, rows: Sequence[Record], request: Request) -> list[str]:
    if mode == "completion" and request.prompt_template is not None:
        raise InputError("humaneval has a prompt of its own: leave prompt_template out, or take humaneval:instruct.")
    if mode == "completion":
        return [prompt_of(row, mode) for row in rows]
    return [templated(request, PAPER_PROMPT, instruction(row)) for row in rows]


def _held_back(held: Sequence[str]) -> str:
    if SECCOMP not in held:
        return "without a sandbox (--unsafe-code)"
    return "in a sandbox" if LANDLOCK in held else f"in a sandbox without {LANDLOCK} (files can be read)"


def _prepare(mode: Mode, name: str, request: Request) -> Prepared:
    # whether programs can be held back here is known before the model is loaded
    held = layers(unsafe=request.unsafe_code)

    def judged(output: str, row: Record) -> Record:
        program, outcome = judge(row, output, mode, seconds=SECONDS, unsafe=request.unsafe_code)
        ended = {"ended": outcome.status, "detail": outcome.detail}
        return {"answer": program, "expected": row["task_id"], "correct": outcome.status == "passed"} | ended

    prepared = Protocol(
        name=name,
        description=f"{_DESCRIPTIONS[mode]}; pass@1 of programs run {_held_back(held)}, {SECONDS:g} s of processor time each",
        fields=FIELDS,
        prompts=partial(_prompts, mode),
        judge=judged,
        max_new_tokens=NEW_TOKENS,
        stop=STOP if mode == "completion" else (),
        source="openai/openai_humaneval",
        check=check_row,
    ).prepare(request)
    # unsafe_code changes nothing where all layers are there
    return replace(prepared, identity=prepared.identity | {"held_back": held})


TASKS = (
    Task("humaneval", partial(_prepare, "completion", "humaneval")),
    Task("humaneval:instruct", partial(_prepare, "instruct", "humaneval:instruct"), heeds=("prompt_template",)),
)
