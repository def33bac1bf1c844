"""Makes docs/api.md, the reference of bonetune's public names, from their docstrings.

`python docs/make_api.py` writes the page; with `--check` it exits with 1 if the page is not what it would write. The page
has the names of `bonetune.__all__`, `bonetune.ops.__all__` and `bonetune.rwkv.__all__`, and the result types that those
functions return. A name stands in the section of the module that defines it, so a new one needs a docstring, and nothing here.
"""

import argparse
import dataclasses
import enum
import inspect
import json
import re
import sys
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import bonetune
from bonetune import errors, ops, rwkv, spec
from bonetune.files import write_text

PAGE = Path(__file__).with_name("api.md")
LONGEST_LINE = 100  # longer signatures have a line for each argument


class Section(NamedTuple):
    """A part of the page: what is defined in these modules or inside them, unless a longer name in another part matches."""

    title: str
    introduction: str
    modules: tuple[str, ...]


SECTIONS = (
    Section("Configuration", "What an adapter is, as PEFT reads and writes it.", ("bonetune.tuner.config",)),
    Section("The tuner: models and layers", "What PEFT's own functions make of a configuration.", ("bonetune.tuner",)),
    Section("Family and equations", inspect.cleandoc(spec.__doc__ or ""), ("bonetune.spec", "bonetune.ops")),
    Section(
        "Verbs",
        "The command line's verbs as functions, and what they return.",
        (
            "bonetune.training",
            "bonetune.tokenization",
            "bonetune.evaluation",
            "bonetune.experiments",
            "bonetune.merging",
            "bonetune.conversion",
            "bonetune.certificates",
            "bonetune.hub",
            "bonetune.models",
            "bonetune.demonstration",
            "bonetune.diagnostics",
        ),
    ),
    Section("RWKV", inspect.cleandoc(rwkv.__doc__ or ""), ("bonetune.rwkv",)),
    Section("Errors", inspect.cleandoc(errors.__doc__ or ""), ("bonetune.errors",)),
)
# Module and description of each constant: Python keeps neither.
CONSTANTS = {"bonetune.VARIANTS": ("bonetune.spec", "The names of the family's members, as `variant` takes them.")}


class PageError(Exception):
    """Public names that the page cannot show, all of them."""


class Docstring(NamedTuple):
    """A Google-style docstring taken apart: its text, and the lines under each heading ("Args", "Raises", ...)."""

    text: str
    under: dict[str, list[str]]

    def items(self, heading: str) -> list[tuple[str, str]]:
        """Name and text of each entry under a heading; `a, b: text` is two entries."""
        found: list[tuple[str, str]] = []
        for line in self.under.get(heading, ()):
            if line.startswith(" "):
                found[-1] = (found[-1][0], f"{found[-1][1]} {line.strip()}")
            elif line:
                names, _, text = line.partition(":")
                found.append((names, text.strip()))
        return [(name.strip(), text) for names, text in found for name in names.split(",")]


class Entry(NamedTuple):
    """A public name as users write it, what it stands for, and the module that defines it."""

    name: str
    thing: Any
    module: str

    @property
    def link(self) -> str:
        return f"[`{self.name.removeprefix('bonetune.')}`](#{_anchor(self.name)})"


def docstring(thing: Any) -> Docstring | None:
    """The thing's own docstring; None if it has none, or only the signature that Python gives to dataclasses and tuples."""
    doc = thing.__doc__
    if not doc or (inspect.isclass(thing) and doc.startswith(f"{thing.__name__}(")):
        return None
    under: dict[str, list[str]] = {"": []}
    heading = ""
    for line in inspect.cleandoc(doc).splitlines():
        if title := re.fullmatch(r"([A-Z]\w+):", line):
            heading = title[1]
            under[heading] = []
            continue
        if line and not line.startswith(" "):
            heading = ""
        under[heading].append(line)
    text = "\n".join(under.pop("")).strip()
    return Docstring(text, {title: textwrap.dedent("\n".join(lines)).strip().split("\n") for title, lines in under.items()})


def signature(thing: Any) -> inspect.Signature:
    """How a function or class is called. Of a dataclass, only the fields that it has from bonetune, and not from PEFT."""
    if inspect.isclass(thing) and (issubclass(thing, BaseException) or getattr(thing, "_is_protocol", False)):
        return inspect.Signature()
    function: Any = thing.fget if isinstance(thing, property) else getattr(thing, "__func__", thing)
    full = inspect.signature(function)
    kept = [p for p in full.parameters.values() if p.name not in ("self", "cls")]
    if inspect.isclass(thing) and dataclasses.is_dataclass(thing):
        makers = {f.name: f.default_factory for f in dataclasses.fields(thing)}
        made = {p.name: makers.get(p.name, dataclasses.MISSING) for p in kept}  # a class may have an __init__ of its own
        kept = [p if (make := made[p.name]) is dataclasses.MISSING else p.replace(default=make()) for p in kept]
        ours = {name for base in thing.__mro__ if _is_ours(base) for name in inspect.get_annotations(base)}
        if full.parameters.keys() <= makers.keys() and not ours.issuperset(makers):  # PEFT's fields come first
            kept = [p.replace(kind=p.KEYWORD_ONLY) for p in kept if p.name in ours]
    return full.replace(parameters=kept, **({"return_annotation": full.empty} if inspect.isclass(thing) else {}))


def entries() -> list[Entry]:
    """What the page shows. Raises `PageError` naming every public name that has no section or no docstring."""
    public = [_entry(f"bonetune.{name}", getattr(bonetune, name)) for name in bonetune.__all__]
    public += [_entry(f"bonetune.ops.{name}", getattr(ops, name)) for name in ops.__all__]
    public += [_entry(f"bonetune.rwkv.{name}", getattr(rwkv, name)) for name in rwkv.__all__]
    shown = {entry.thing for entry in public if inspect.isclass(entry.thing)}
    found = [entry for first in public for entry in _with_results(first, shown)]
    if wrong := [f"{entry.name} {reason}" for entry in found if (reason := _what_is_wrong(entry))]:
        raise PageError(f"docs/make_api.py cannot show every public name: {'; '.join(wrong)}.")
    return found


def members(entry: Entry, classes: dict[type, Entry]) -> Iterator[Entry]:
    """A class's documented public methods and properties, but for those of PEFT, torch and other classes of the page."""
    seen: set[str] = set()
    for base in entry.thing.__mro__ if inspect.isclass(entry.thing) else ():
        for name, member in vars(base).items() if _is_ours(base) and (base is entry.thing or base not in classes) else ():
            is_one = inspect.isfunction(member) or isinstance(member, property | classmethod | staticmethod)
            is_public = not name.startswith("_") or name == "__call__"
            if is_one and is_public and name not in seen and docstring(member) is not None:
                seen.add(name)
                yield Entry(f"{entry.thing.__name__}.{name}", member, entry.module)


def page() -> str:
    """The page, as Markdown."""
    found = entries()
    classes = {entry.thing: entry for entry in found if inspect.isclass(entry.thing)}
    chapters = [(section, [entry for entry in found if _section(entry) is section]) for section in SECTIONS]
    parts = [
        "<!-- Made by docs/make_api.py from the docstrings: change those, then `make api`. -->",
        "# API reference",
        _prose(inspect.cleandoc(bonetune.__doc__ or "")),
        "\n".join(f"* [{s.title}](#{_anchor(s.title)}): {', '.join(e.link for e in inside)}" for s, inside in chapters),
    ]
    for section, inside in chapters:
        parts += [f"## {section.title}", _prose(section.introduction)]
        for entry in inside:
            parts += [f"### `{entry.name}`", *_description(entry, classes)]
            for member in members(entry, classes):
                parts += [f"#### `{member.name}`", *_description(member, classes)]
    return "\n\n".join(parts) + "\n"


def _entry(name: str, thing: Any) -> Entry:
    return Entry(name, thing, CONSTANTS[name][0] if name in CONSTANTS else getattr(thing, "__module__", ""))


def _what_is_wrong(entry: Entry) -> str | None:
    if not callable(entry.thing) and entry.name not in CONSTANTS:
        return "is no class or function: describe it in CONSTANTS"
    if _section(entry) is None:
        return f"has no section: put {entry.module} into SECTIONS"
    return "has no docstring" if callable(entry.thing) and docstring(entry.thing) is None else None


def _section(entry: Entry) -> Section | None:
    matching = [(len(m), section) for section in SECTIONS for m in section.modules if f"{entry.module}.".startswith(f"{m}.")]
    return max(matching)[1] if matching else None


def _with_results(entry: Entry, shown: set[type]) -> Iterator[Entry]:
    """The entry, then classes of bonetune in what a function returns or in a class's fields that are not `shown` yet."""
    yield entry
    hints: list[Any] = []
    if inspect.isclass(entry.thing):
        hints = [p.annotation for p in signature(entry.thing).parameters.values()]
    elif inspect.isfunction(entry.thing):
        hints = [signature(entry.thing).return_annotation]
    for hint in hints:
        hints += typing.get_args(hint)  # and so goes on with them
        if inspect.isclass(hint) and _is_ours(hint) and hint not in shown:
            shown.add(hint)
            yield from _with_results(_entry(f"{_home(hint)}.{hint.__name__}", hint), shown)


def _is_ours(cls: type) -> bool:
    return cls.__module__.split(".")[0] == "bonetune"


def _home(cls: type) -> str:
    """The outermost package that exports the class, or else the module that defines it."""
    parts = cls.__module__.split(".")
    packages = [".".join(parts[:depth]) for depth in range(1, len(parts))]
    return next((p for p in packages if cls.__name__ in getattr(sys.modules[p], "__all__", ())), cls.__module__)


def _description(entry: Entry, classes: dict[type, Entry]) -> Iterator[str]:
    """What stands below an entry's heading, paragraph by paragraph."""
    yield f"```python\n{_call(entry)}\n```"
    doc = Docstring(CONSTANTS[entry.name][1], {}) if entry.name in CONSTANTS else docstring(entry.thing)
    assert doc is not None
    yield _prose(doc.text)
    if inspect.isclass(entry.thing) and (bases := [base for base in entry.thing.__bases__ if base is not object]):
        names = ", ".join(classes[base].link if base in classes else f"`{base.__name__}`" for base in bases)
        yield f"Derives from {names}{' and takes its fields too' if any(map(dataclasses.is_dataclass, bases)) else ''}."
    arguments = signature(entry.thing).parameters.values() if "Args" in doc.under else ()
    types = {p.name: f" (`{_type(p.annotation)}`)" for p in arguments if p.annotation is not p.empty}
    links = {cls.__name__: e.link for cls, e in classes.items()}
    for heading, lines in doc.under.items():
        yield f"**{heading}**"
        if heading == "Args":
            yield "\n".join(f"* `{name}`{types.get(name.lstrip('*'), '')}: {text}" for name, text in doc.items(heading))
        elif heading == "Raises":
            yield "\n".join(f"* {links.get(name, f'`{name}`')}: {text}" for name, text in doc.items(heading))
        elif heading in ("Example", "Examples"):
            yield f"```python\n{_script(lines)}\n```"
        else:
            yield _prose("\n".join(lines))


def _call(entry: Entry) -> str:
    """The signature as code; of a constant, its value."""
    name, thing = entry.name, entry.thing
    if name in CONSTANTS:
        return f"{name} = {_literal(thing)}"
    called = signature(thing)
    result = "" if called.return_annotation is called.empty else _type(called.return_annotation)
    if isinstance(thing, property):
        return f"property {name}: {result}"
    if inspect.isclass(thing) and not called.parameters:
        return f"class {name}"
    result = result and f" -> {result}"
    kind = "class " if inspect.isclass(thing) else f"{type(thing).__name__} " if hasattr(thing, "__func__") else ""
    arguments: list[str] = []
    for p in called.parameters.values():
        if p.kind is p.KEYWORD_ONLY and not any(a.startswith("*") for a in arguments):
            arguments.append("*")
        stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        hint = "" if p.annotation is p.empty else f": {_type(p.annotation)}"
        arguments.append(f"{stars}{p.name}{hint}" + ("" if p.default is p.empty else f" = {_literal(p.default)}"))
    line = f"{kind}{name}({', '.join(arguments)}){result}"
    return line if len(line) <= LONGEST_LINE else f"{kind}{name}(\n    " + ",\n    ".join(arguments) + f",\n){result}"


def _type(annotation: Any) -> str:
    """An annotation without the modules of its names."""
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", inspect.formatannotation(annotation).strip("'")).replace("'", '"')


def _literal(value: Any) -> str:
    """A value as code that is the same in every process."""
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(map(_literal, value)))}}}" if value else "set()"
    if type(value) is tuple:
        return f"({', '.join(map(_literal, value))}{',' * (len(value) == 1)})"
    if callable(value):
        name = getattr(value, "__name__", "")
        return name if name.isidentifier() else "..."  # a lambda's is not
    return repr(value)


def _script(lines: list[str]) -> str:
    """An example without the prompts of a doctest, if it has them, and then with what it prints in comments."""
    if any(line.startswith(">>>") for line in lines):
        lines = [line[4:] if line.startswith((">>>", "...")) else f"# {line}" if line else line for line in lines]
    return "\n".join(lines)


def _prose(text: str) -> str:
    """Text with one line a paragraph, for a line must not begin with a formula's `+` or `*`. Tables and lists stay."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(p if p.startswith(("|", "* ", "- ")) else " ".join(p.split()) for p in paragraphs)


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def main() -> None:
    parser = argparse.ArgumentParser(description=inspect.cleandoc(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if docs/api.md is out of date")
    check = parser.parse_args().check
    try:
        made = page()
    except PageError as error:
        sys.exit(str(error))
    if not check:
        write_text(PAGE, made)
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != made:
        sys.exit("docs/api.md is not what the docstrings say: run `make api` and commit the page.")


if __name__ == "__main__":
    main()
