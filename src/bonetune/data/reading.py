"""Rows from local files (jsonl, json, parquet) or from a data set of the Hugging Face hub."""

import json
from pathlib import Path
from typing import Any

from bonetune.errors import InputError

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".json", ".parquet")


def read_rows(source: str, split: str = "train") -> list[Row]:
    """All rows of `source`.

    Args:
        source: a .jsonl, .json (a list of objects) or .parquet file, or the id of a data set on the hub.
        split: for a data set of the hub, its split, slices included ("train[:5000]").

    Raises:
        InputError: no such file or data set, an unreadable file (with the line), or no rows.
    """
    path = Path(source)
    rows = _read_file(path) if path.suffix in SUFFIXES or path.exists() else _read_hub(source, split)
    if not rows:
        raise InputError(f"Data set {source} is empty: it needs at least one row.")
    return rows


def _read_file(path: Path) -> list[Row]:
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise InputError(f"Data file {path} {what}: give a {', '.join(SUFFIXES)} file or the id of a data set on the hub.")
    match path.suffix:
        case ".jsonl":
            return _read_json_lines(path)
        case ".json":
            return _checked(path, _parse(path, _text(path), "file"))
        case ".parquet":
            return _read_parquet(path)
    raise InputError(f"Data file {path} has an unknown suffix {path.suffix!r}: use {', '.join(SUFFIXES)}.")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"Data file {path} is not UTF-8 text (byte {error.start}): convert it first.") from error


def _parse(path: Path, text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"Data file {path}, {where}: not JSON ({error.msg}, column {error.colno}).") from error


def _read_json_lines(path: Path) -> list[Row]:
    lines = _text(path).split("\n")
    return _checked(path, [_parse(path, line, f"line {n}") for n, line in enumerate(lines, 1) if line.strip()])


def _checked(path: Path, rows: Any) -> list[Row]:
    if not isinstance(rows, list):
        raise InputError(f"Data file {path} holds one {type(rows).__name__}, not a list of objects.")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise InputError(f"Data file {path}, row {number}: {str(row)[:60]!r} is not an object with named fields.")
    return rows


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"Data file {path} is not a parquet file ({error}).") from error


def _read_hub(source: str, split: str) -> list[Row]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return list(load_dataset(source, split=split))  # pyright: ignore[reportArgumentType, reportReturnType]  (rows of a map-style data set are dicts)
    except (OSError, ValueError, DatasetsError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"Data set {source!r} is neither a local file nor to be had from the hub (split {split!r}): {reason}"
        ) from error
