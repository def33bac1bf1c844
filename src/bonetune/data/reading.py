"""Rows from local files (jsonl, json, csv, parquet, bin with idx), from a data set of the hub, or generated."""

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from bonetune.data import binidx
from bonetune.data.generated import generated_rows, is_generated
from bonetune.data.slices import Slice
from bonetune.errors import InputError

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet", *binidx.SUFFIXES)


def read_rows(source: str, split: str = "train") -> list[Row]:
    """All rows of `source`.

    Args:
        source: a .jsonl, .jsonl.gz, .json (a list of objects, or JSON lines), .csv (with a line of names) or .parquet file,
            one of a pair of token files (.bin, .idx) or the name without suffix that both have; the id of a data set on the
            hub, with the name of its configuration behind a colon if it has several: openai/gsm8k:main; or generated problems,
            reasoning-gym:TASK (`bonetune.data.generated`).
        split: "train", or a slice as the hub writes it: "train[:5000]", "train[10%:20%]", "test[-100:]". Of a file, only the
            slice counts.

    Raises:
        InputError: no such file or data set, an unreadable file (with the line), or no rows.
    """
    if is_generated(source):
        rows: list[Row] = list(generated_rows(source, split))
    else:
        rows = _sliced(list(_file_rows(Path(source))), split) if _is_file(source) else list(_hub_rows(source, split, False))
    if not rows:
        raise _empty(source, split)
    return rows


def stream_rows(source: str, split: str = "train") -> Iterator[Row]:
    """The rows of `read_rows`, read as they are asked for: by line, by row group of a parquet file, from the hub as they come.

    Ids of token files stay there until they are used. A .json file is read whole. Slices with %, or counted from the end, need
    all rows and are refused.
    """
    if is_generated(source):
        yield from generated_rows(source, split)
        return
    part = Slice.parse(split)
    if part.needs_count:
        raise InputError(f"dataset_split {split!r} needs the number of rows, which a stream does not know: use train[100:200].")
    rows = _file_rows(Path(source)) if _is_file(source) else _hub_rows(source, part.name, True)
    empty = True
    for row in islice(rows, part.start, part.stop):
        empty = False
        yield row
    if empty:
        raise _empty(source, split)


def _empty(source: str, split: str) -> InputError:
    part = f" has no rows in {split!r}" if "[" in split else " is empty: it needs at least one row"
    return InputError(f"Data set {source}{part}.")


def _sliced(rows: list[Row], split: str) -> list[Row]:
    start, stop = Slice.parse(split).bounds(len(rows))
    return rows[start:stop]


def _is_file(source: str) -> bool:
    return source.endswith(SUFFIXES) or Path(source).exists() or binidx.is_binidx(source)


def _file_rows(path: Path) -> Iterator[Row]:
    if not path.is_file() and not binidx.is_binidx(path):
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise InputError(f"Data file {path} {what}: give a {', '.join(SUFFIXES)} file or the id of a data set on the hub.")
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        rows = _json_lines(path)
    elif path.suffix == ".json":
        rows = _json_list(path)
    elif path.suffix == ".csv":
        rows = _csv_rows(path)
    elif path.suffix == ".parquet":
        rows = _parquet_rows(path)
    elif binidx.is_binidx(path):
        rows = binidx.binidx_rows(path)
    else:
        raise InputError(f"Data file {path} has an unknown suffix {path.suffix!r}: use {', '.join(SUFFIXES)}.")
    try:
        yield from rows
    except UnicodeDecodeError as error:
        raise InputError(
            f"Data file {path} is not UTF-8 text (byte {error.object[error.start]:#x}): convert it first."
        ) from error
    except OSError as error:
        raise InputError(f"Data file {path} cannot be read: {error.strerror or error}.") from error
    except (EOFError, zlib.error) as error:
        raise InputError(f"Data file {path} is cut off or damaged ({error}): fetch it anew.") from error


def _open(path: Path) -> TextIO:
    # "\n" alone ends a line of JSON; a byte-order mark, as spreadsheets write it, is no part of the text
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="\n")
    return path.open(encoding="utf-8-sig", newline="" if path.suffix == ".csv" else "\n")


def _parse(path: Path, text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"Data file {path}, {where}: not JSON ({error.msg}, column {error.colno}).") from error


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def _json_lines(path: Path) -> Iterator[Row]:
    with _open(path) as file:
        values = (_parse(path, line, f"line {number}") for number, line in enumerate(file, 1) if line.strip())
        yield from _objects(path, values)


def _json_list(path: Path) -> Iterator[Row]:
    with _open(path) as file:
        text = file.read()
    try:
        content = _parse(path, text, "file")
    except InputError:
        if not _is_json(text.lstrip().partition("\n")[0]):
            raise
        yield from _json_lines(path)
        return
    if not isinstance(content, list):
        raise InputError(f"Data file {path} holds one {type(content).__name__}, not a list of objects.")
    yield from _objects(path, content)


def _objects(path: Path, values: Iterable[Any]) -> Iterator[Row]:
    for number, row in enumerate(values, 1):
        if not isinstance(row, dict):
            raise InputError(f"Data file {path}, row {number}: {str(row)[:60]!r} is not an object with named fields.")
        yield row


def _csv_rows(path: Path) -> Iterator[Row]:
    csv.field_size_limit(1 << 30)  # the module's own limit is 128 kB a cell
    with _open(path) as file:
        lines = csv.reader(file, strict=True)
        try:
            names = next(lines, [])
            if len(set(names)) < len(names) or not all(names[1:]):
                raise InputError(f"Data file {path}, line 1: the columns' names {names} are not all there and different.")
            for cells in lines:
                if cells and len(cells) != len(names):
                    raise InputError(
                        f"Data file {path}, line {lines.line_num}: {len(cells)} cells under {len(names)} names "
                        f"({', '.join(names)})."
                    )
                if cells:
                    yield dict(zip(names, cells, strict=True))
        except csv.Error as error:
            raise InputError(f"Data file {path}, line {lines.line_num}: not CSV ({error}).") from error


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                yield from file.read_row_group(group).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"Data file {path} is not a parquet file ({error}).") from error


def _hub_rows(source: str, split: str, streaming: bool) -> Iterator[Row]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    name, _, configuration = source.partition(":")
    try:
        yield from load_dataset(name, configuration or None, split=split, streaming=streaming)  # pyright: ignore[reportArgumentType, reportReturnType]  (rows are dicts)
    except (OSError, ValueError, DatasetsError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"Data set {source!r} is neither a local file nor to be had from the hub (split {split!r}): {reason}"
        ) from error
