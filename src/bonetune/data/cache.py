"""Tokenized data kept by content, so that a second run on the same rows need not tokenize them again."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from safetensors import SafetensorError

from bonetune.data.encoding import VERSION, Lengths, encode_rows
from bonetune.data.examples import EncodedSet
from bonetune.data.formats import RowFormat
from bonetune.errors import InputError
from bonetune.files import cache_folder


def cached_encode_rows(
    rows: Sequence[dict[str, Any]], row_format: RowFormat, tokenizer: Any, **settings: Any
) -> tuple[EncodedSet, Lengths]:
    """What `encode_rows` returns with these arguments, from $XDG_CACHE_HOME/bonetune/tokens if it has been there before.

    A file there is named by everything its content follows from. One that is damaged is made again. Tokenizers that cannot be
    written down (those in pure Python) are not cached. Where the folder cannot be written, a warning says so.

    Raises `InputError` as `encode_rows` does.
    """
    name = content_key(rows, row_format, tokenizer, settings)
    if name is None:
        return encode_rows(rows, row_format, tokenizer, **settings)
    folder = cache_folder() / "tokens"
    return _kept(folder / f"{name}.safetensors", lambda: encode_rows(rows, row_format, tokenizer, **settings))


def content_key(rows: Sequence[dict[str, Any]], row_format: RowFormat, tokenizer: Any, settings: dict[str, Any]) -> str | None:
    """A name for everything that tokenized rows follow from; None if the tokenizer cannot be written down."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    # truncation and padding are what the last call happened to ask for
    written = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    about = {
        "version": VERSION,
        "transformers": transformers.__version__,
        "tokenizer": written,
        "chat_template": tokenizer.chat_template,
        "special_tokens": tokenizer.special_tokens_map,
        "format": asdict(row_format),
        "settings": settings,
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for row in rows:
        digest.update(json.dumps(row, default=_in_words).encode() + b"\n")
    return digest.hexdigest()


def _in_words(value: Any) -> str:
    """What JSON does not know, as text that tells all of it: numpy's own leaves out the middle of a long array."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
    return str(value)


def _kept(path: Path, make: Callable[[], tuple[EncodedSet, Lengths]]) -> tuple[EncodedSet, Lengths]:
    if (kept := _undamaged(path)) is not None:
        return kept
    examples, lengths = make()
    try:
        _write(path, examples, lengths)
    except (OSError, SafetensorError) as error:
        warnings.warn(f"Tokens are not kept in {path.parent} (cache_tokens: false does without): {error}", stacklevel=2)
    return examples, lengths


def _write(path: Path, examples: EncodedSet, lengths: Lengths) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        examples.save(beside, {"lengths": json.dumps(asdict(lengths))})
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _undamaged(path: Path) -> tuple[EncodedSet, Lengths] | None:
    """What the file holds, or None if it is not there or not whole."""
    if not path.is_file():
        return None
    try:
        examples, notes = EncodedSet.load(path)
    except InputError:
        return None
    return examples, Lengths(**json.loads(notes["lengths"]))
