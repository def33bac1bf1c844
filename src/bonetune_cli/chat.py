"""`bonetune chat`."""

import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from bonetune.evaluation import Chat

_COMMANDS = "/reset begins a new conversation, /quit or Ctrl-D ends, Ctrl-C stops an answer, /help shows this."
# Below this, two columns are too narrow to read.
_NARROW = 80
_TITLES = ("with the adapter", "without it")
# What a terminal would take as an order, and an answer has no business with.
_CONTROLS = {code: "�" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def chat(
    model: Annotated[str, typer.Argument(help="Model folder, hub id, or adapter folder.", metavar="MODEL_OR_ADAPTER")],
    base: Annotated[str | None, typer.Option(help="The adapter's base model, if it has moved.")] = None,
    compare: Annotated[bool, typer.Option("--compare/--no-compare", help="Answer without the adapter as well.")] = False,
    system: Annotated[str | None, typer.Option(help="The conversation's system message.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Answer this one question and stop.")] = None,
    prompt_template: Annotated[
        str | None,
        typer.Option(help="With {instruction} in it; default: the chat template, or what the adapter was trained on."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most probable token; 1 draws from all.")] = 0.0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print each question with its answers as one line of JSON.")] = False,
) -> None:
    """Talk with a model or an adapter. Without a terminal, each line of standard input is a question."""
    import bonetune
    from bonetune.errors import BonetuneError
    from bonetune_cli.console import console, quiet_libraries

    quiet_libraries()
    chats = [
        bonetune.Chat(
            model,
            system=system,
            prompt_template=prompt_template,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            base=base,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
    ]
    if compare:
        first = chats[0]
        same = {"prompt_template": first.prompt_template, "max_new_tokens": max_new_tokens, "temperature": temperature}
        chats.append(bonetune.Chat(first.loaded, adapter=False, system=system, **same))
    interactive = prompt is None and sys.stdin.isatty()
    if interactive:
        how = "by the chat template" if chats[0].prompt_template is None else "each by itself, in the prompt template"
        console.print(f"{model}: questions are put {how}. {_COMMANDS}", style="dim")
    for question in _questions(interactive) if prompt is None else (prompt,):
        match question if prompt is None else "":
            case "/quit":
                break
            case "/help":
                console.print(_COMMANDS)
            case "/reset":
                for one in chats:
                    one.reset()
            case _:
                try:
                    _answer(chats, question, json)
                except BonetuneError as error:
                    if not interactive:
                        raise
                    console.print(f"bonetune: {error}", style="yellow")


def _questions(interactive: bool) -> Iterator[str]:
    """What is typed, or the lines of standard input, without empty ones."""
    if not interactive:
        yield from filter(None, map(str.strip, sys.stdin))
        return
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  (gives input() a history and its keys)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()  # noqa: T201
            return
        except KeyboardInterrupt:
            print()  # noqa: T201
            continue
        if line:
            yield line


def _answer(chats: "list[Chat]", question: str, json: bool) -> None:
    """Show each chat's answer: as JSON, in columns where there are two and the terminal is wide, else one after the other."""
    import json as json_module

    from bonetune_cli.console import out

    if json:
        answers = ["".join(one.ask(question)) for one in chats]
        names = ("answer", "answer_without_adapter")
        print(json_module.dumps({"prompt": question} | dict(zip(names, answers, strict=False)), ensure_ascii=False))  # noqa: T201
    elif len(chats) == 2 and out.is_terminal and out.width >= _NARROW:
        _columns(chats, question)
    else:
        for title, one in zip(_TITLES, chats, strict=False):
            if len(chats) > 1:
                out.print(f"{title}:", style="bold")
            _stream(one, question, lambda piece: print(piece, end="", flush=True))  # noqa: T201  (rich would turn tabs into spaces)
            print()  # noqa: T201


def _columns(chats: "list[Chat]", question: str) -> None:
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    from bonetune_cli.console import out

    answers = [""] * len(chats)

    def table() -> Table:
        shown = Table.grid(expand=True, padding=(0, 3, 0, 0))
        for _ in chats:
            shown.add_column(ratio=1)
        shown.add_row(*(Text(title, style="bold") for title in _TITLES))
        shown.add_row(*map(Text, answers))
        return shown

    # the live display shows what fits on the screen; what stays is printed whole
    with Live(console=out, transient=True, auto_refresh=False) as live:
        for number, one in enumerate(chats):

            def add(piece: str, number: int = number) -> None:
                answers[number] += piece
                live.update(table(), refresh=True)

            _stream(one, question, add)
    out.print(table(), soft_wrap=False)


def _stream(one: "Chat", question: str, show: Callable[[str], None]) -> None:
    """Show an answer piece by piece, fit for a terminal. Ctrl-C ends this answer, and nothing else."""
    try:
        with closing(one.ask(question)) as pieces:
            for piece in pieces:
                show(piece.translate(_CONTROLS))
    except KeyboardInterrupt:
        show(" [stopped]")
