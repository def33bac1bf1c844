"""Makes docs/settings.md and docs/run.schema.json, the reference of a run's settings, from `bonetune.training.settings`.

`python docs/make_settings.py` writes both; with `--check` it exits with 1 if they are not what it would write.
"""

import argparse
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from bonetune.files import write_text
from bonetune.training import aliases, settings, words
from bonetune.training.config import RunConfig
from bonetune.training.presets import PRESETS

PAGE = Path(__file__).with_name("settings.md")
SCHEMA = Path(__file__).with_name("run.schema.json")
SECTIONS: tuple[type[BaseModel], ...] = (
    settings.ModelSettings,
    settings.DataSettings,
    settings.AdapterSettings,
    settings.BaselineSettings,
    settings.RWKVSettings,
    settings.OptimizationSettings,
    settings.OutputSettings,
    settings.DistributedSettings,
)
LONGEST_DEFAULT = 24
INTRODUCTION = """\
# Settings

What `bonetune train` can be told, in a YAML or TOML file, on the command line (`key=value`, the value in YAML), or as a
mapping in Python. Three keys have no default and must be given. A key with a dot is one entry of a mapping:
`rank_pattern.q_proj=32`. Where a list is taken, one value is one, too, and so is a text with commas (but for names of files).

An editor that knows YAML's language server completes and checks a file that begins with

```yaml
# yaml-language-server: $schema=PATH_TO/docs/run.schema.json
```
"""
PRESETS_TEXT = """\
## Presets

`preset: NAME` lays a run's own settings over those of a published experiment; they say how is trained, and not what or on what.
[from-scripts.md](from-scripts.md) says where they come from.
"""
WORDS_TEXT = """\
## Words of other tools

Read as the keys above, with a notice of the class `bonetune.training.ConfigNotice`. A word and its key may not contradict each
other, and a value on the command line wins over a word in the file. Numbers and names stay as they are, except where the table
says so.
"""


def page() -> str:
    """docs/settings.md."""
    parts = ["<!-- Made by docs/make_settings.py: change src/bonetune/training and run `make settings`. -->"]
    parts += [INTRODUCTION.strip(), *map(_section, SECTIONS), PRESETS_TEXT.strip()]
    parts += [_presets(), WORDS_TEXT.strip(), _table(("word", "key"), _words())]
    parts += ["### Not used", "Named in a notice, for what they ask for is the case, or of no effect on the result."]
    parts.append(_table(("words", "because"), ((_codes(names.split()), why) for why, names in words.IGNORED.items())))
    parts += ["### Refused", "Nothing here corresponds to them. Left empty or false, they are let pass with a notice."]
    parts.append(_table(("words", "because"), _refused()))
    return "\n\n".join(parts) + "\n"


def schema() -> str:
    """docs/run.schema.json: the settings under our own names, for editors."""
    made = RunConfig.model_json_schema()
    for described in made["properties"].values():
        described.pop("title", None)
    made["properties"]["preset"] = {"description": "settings that these are laid over", "enum": [*PRESETS, None]}
    entries = "|".join(name for name, field in RunConfig.model_fields.items() if "dict" in str(field.annotation))
    made["patternProperties"] = {rf"^({entries})\..+$": {"description": "one entry of a setting that is a mapping"}}
    made["title"] = "A run of bonetune"
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **made}, indent=2, ensure_ascii=False) + "\n"


def _section(section: type[BaseModel]) -> str:
    title = section.__name__.removesuffix("Settings")
    fields = {name: section.model_fields[name] for name in inspect.get_annotations(section)}
    rows = ((f"`{name}`", _values(field), _default(field), field.description or "") for name, field in fields.items())
    text = inspect.cleandoc(section.__doc__ or "")
    return f"## {title}\n\n{text}\n\n{_table(('key', 'values', 'default', 'meaning'), rows)}"


def _values(field: FieldInfo) -> str:
    """Types and bounds, for people."""
    return " or ".join(dict.fromkeys(_kinds(field.annotation, tuple(field.metadata))))


def _kinds(kind: Any, bounds: tuple[Any, ...] = ()) -> Iterator[str]:
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        for inner in get_args(kind):
            if inner is not type(None):
                yield from _kinds(inner, bounds)
    elif origin is Literal:
        yield ", ".join(f"`{value}`" for value in get_args(kind))
    elif origin is tuple:
        yield f"list of {' or '.join(_kinds(get_args(kind)[0]))}"
    elif origin is dict:
        yield "mapping" if Any in get_args(kind) else f"mapping to {' or '.join(_kinds(get_args(kind)[1]))}"
    elif hasattr(kind, "__metadata__"):  # PositiveInt and the like
        yield from _kinds(get_args(kind)[0], (*kind.__metadata__, *bounds))
    else:
        name = {str: "text", bool: "true, false", int: "integer", float: "number"}[kind]
        yield " ".join((name, *(_bound(bound) for bound in bounds))) if kind in (int, float) else name


def _bound(bound: Any) -> str:
    match bound:
        case annotated_types.Gt():
            return f"> {bound.gt}"
        case annotated_types.Ge():
            return f">= {bound.ge}"
        case annotated_types.Lt():
            return f"< {bound.lt}"
    raise ValueError(f"no words for the bound {bound!r}")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**must be given**"
    value = field.get_default(call_default_factory=True)
    if value is None or value in ((), {}):
        return "-"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return f"`{text}`" if len(text) <= LONGEST_DEFAULT else "the papers'"


def _presets() -> str:
    keys = list(dict.fromkeys(key for values in PRESETS.values() for key in values))
    rows = ((f"`{key}`", *(_preset_value(values, key) for values in PRESETS.values())) for key in keys)
    return _table(("key", *(f"`{name}`" for name in PRESETS)), rows)


def _preset_value(values: dict[str, Any], key: str) -> str:
    value = values.get(key)
    return "" if key not in values else ", ".join(value) if isinstance(value, list) else json.dumps(value).strip('"')


def _words() -> Iterator[tuple[str, str]]:
    """Words by what they mean, in the order of our keys."""
    means = {word: key for word, key in aliases.WORDS.items() if key and word != key}
    order = list(RunConfig.model_fields)
    for key in sorted(set(means.values()), key=lambda key: (order.index(key.partition(",")[0]), key)):
        yield _codes(word for word, meaning in means.items() if meaning == key), f"`{key}`" if "," not in key else key


def _refused() -> Iterator[tuple[str, str]]:
    for why in dict.fromkeys(words.REFUSED.values()):
        yield _codes(word for word, reason in words.REFUSED.items() if reason == why), why


def _codes(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = [head, ("---",) * len(head), *(tuple(cell.replace("|", "\\|") for cell in row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=inspect.cleandoc(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the files are out of date")
    check = parser.parse_args().check
    for path, made in ((PAGE, page()), (SCHEMA, schema())):
        if not check:
            write_text(path, made)
        elif not path.is_file() or path.read_text(encoding="utf-8") != made:
            sys.exit(f"docs/{path.name} is not what the settings say: run `make settings` and commit it.")


if __name__ == "__main__":
    main()
