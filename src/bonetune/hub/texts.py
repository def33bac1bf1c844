"""The texts of an artifact as the hub is to have them: with the base model's name there, and no paths of this machine."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from bonetune.errors import InputError, first_line
from bonetune.files import CERTIFICATE_FILE, CONVERSION_FILE, SUMMARY_FILE, read_config, read_run
from bonetune.formats.tensors import ADAPTER_CONFIG
from bonetune.hub.contents import CARD_FILE, MODEL_CONFIG
from bonetune.rwkv.weights import is_pth

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Those that tell the hashes of others.
_TELLING = (CERTIFICATE_FILE, CONVERSION_FILE)
_OURS = (ADAPTER_CONFIG, MODEL_CONFIG, SUMMARY_FILE, *_TELLING)
_FRONT_MATTER = re.compile(r"\A---\n(.*?\n)---\n", re.DOTALL)
_LIBRARIES = {"adapter": "peft", "model": "transformers"}


def _tells(name: str) -> bool:
    """Whether a file tells of others: beside a file, it has that one's name before its own."""
    return name in _TELLING or name.endswith(tuple(f".{own}" for own in _TELLING))


def published_base(place: Path, kind: str, base_model_id: str | None) -> str | None:
    """The base model's name on the hub: as told, or as the adapter names it; None: it is not known, and not needed.

    Raises:
        InputError: the adapter names a folder of this machine and nothing is told, or what is told is no name.
    """
    if base_model_id is not None:
        if not _HUB_ID.fullmatch(base_model_id):
            raise InputError(f"base_model_id should be a model's name on the hub, such as owner/name, not {base_model_id!r}.")
        return base_model_id
    named = read_config(place / ADAPTER_CONFIG).get("base_model_name_or_path") if kind == "adapter" else None
    if named and (not _HUB_ID.fullmatch(named) or Path(named).exists() or is_pth(named)):
        kind = "file" if is_pth(named) else "folder"
        raise InputError(
            f"The base model of {place} is the {kind} {named}, which nobody else has: pass --base-model-id with its name on "
            "the hub."
        )
    return named


def texts_to_publish(place: Path, names: list[str], kind: str, base: str | None) -> dict[str, str]:
    """The texts that are not published as they lie in the folder, by name; a model card among them if there is none.

    Args:
        place: the folder.
        names: of its files that are published.
        kind: of artifact.
        base: the base model's name on the hub.
    """
    before = {name: _text(place / name) for name in names if name in (*_OURS, CARD_FILE) or _tells(name)}
    local = _local_paths(place, before)
    if kind == "adapter" and base is not None:
        local |= {path: base for path in [read_config(place / ADAPTER_CONFIG).get("base_model_name_or_path")] if path in local}
    after = {name: _without(text, local) for name, text in before.items()}
    if kind == "adapter":
        config = json.loads(after[ADAPTER_CONFIG])
        if config.get("base_model_name_or_path") != base:
            after[ADAPTER_CONFIG] = _json(config | {"base_model_name_or_path": base})
    after[CARD_FILE] = _with_base(place, after[CARD_FILE], base) if CARD_FILE in after else _card(place, kind, base)
    digests = {_digest(before[name]): _digest(after[name]) for name in before if not _tells(name)}
    after |= {name: _without(after[name], digests) for name in after if _tells(name)}
    return {name: text for name, text in after.items() if text != before.get(name)}


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text in UTF-8: {first_line(error)}") from error


def _local_paths(place: Path, texts: dict[str, str]) -> dict[str, str]:
    """Absolute paths that the run or the texts of an artifact tell of, and what is said in their stead."""
    told = [read_run(place), *(read_config(place / name) for name in texts if name.endswith(".json"))]
    paths = {text: Path(text).name for value in told for text in _strings(value) if _is_absolute(text)}
    known = {place.resolve(): place.resolve().name, Path.home(): "~"}
    return paths | {str(path): word for path, word in known.items() if path.name}


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def _is_absolute(text: str) -> bool:
    return "\n" not in text and Path(text).is_absolute() and len(Path(text).parts) > 2


def _without(text: str, local: dict[str, str]) -> str:
    """A text with other words for local paths, however Markdown or JSON may have spelt them."""
    if not local:
        return text
    words = {}
    for path, word in local.items():
        spellings = {path, json.dumps(path, ensure_ascii=False)[1:-1], re.sub(r"([\\`*_\[\]<>|~#])", r"\\\1", path)}
        words |= dict.fromkeys(spellings, word)
    spelt = "|".join(map(re.escape, sorted(words, key=len, reverse=True)))
    return re.sub(rf"(?<![\w/.])({spelt})(?![\w-])", lambda found: words[found[1]], text)


def _with_base(place: Path, card: str, base: str | None) -> str:
    """A card whose front matter names the base model as the hub has it."""
    found = _FRONT_MATTER.match(card)
    try:
        front = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError as error:
        raise InputError(f"The front matter of {place / CARD_FILE} is no YAML: {first_line(error)}") from error
    if not isinstance(front, dict):
        raise InputError(f"The front matter of {place / CARD_FILE} should be settings by name.")
    if base is None or front.get("base_model") == base or isinstance(front.get("base_model"), list):
        return card
    lines = re.sub(r"^base_model:.*\n", "", found[1], flags=re.MULTILINE) if found else ""
    return f"---\nbase_model: {base}\n{lines}---\n" + (card[found.end() :] if found else f"\n{card}")


def _card(place: Path, kind: str, base: str | None) -> str:
    """A short card: what it is, of which model, how it was proven."""
    config = read_config(place / ADAPTER_CONFIG) if kind == "adapter" else {}
    method = str(config.get("peft_type", "")).lower()
    known = {
        "base_model": base,
        "library_name": _LIBRARIES.get(kind),
        "tags": [tag for tag in (method, config.get("variant"), kind if kind == "gguf" else None) if tag] + ["bonetune"],
    }
    of = f" of {base}" if base else ""
    sentences = {
        "adapter": f"An adapter ({method}){of}.",
        "model": f"A model{of or ' with an adapter merged into it'}, written by bonetune.",
        "gguf": f"GGUF files{of}, written by bonetune.",
    }
    if (place / CERTIFICATE_FILE).is_file():
        sentences[kind] += f" {CERTIFICATE_FILE} says how it was compared with what it was made from."
    front = yaml.safe_dump({name: value for name, value in known.items() if value}, sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n# {place.resolve().name}\n\n{sentences[kind]}\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
