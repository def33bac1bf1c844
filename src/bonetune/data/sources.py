"""The data sets of a run: their names and formats, their rows encoded, and what is said of them in errors."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from bonetune.data.cache import cached_encode_rows
from bonetune.data.encoding import Lengths, encode_rows
from bonetune.data.examples import EncodedSet
from bonetune.data.formats import RowFormat
from bonetune.data.labelled import find_classes
from bonetune.data.reading import Row
from bonetune.errors import InputError


@dataclass(frozen=True)
class Encode:
    """`encode_rows`, from the cache or not, with the settings that all data sets of a run share."""

    tokenizer: Any
    cache_tokens: bool
    settings: dict[str, Any]

    def __call__(self, name: str, rows: Sequence[Row], row_format: RowFormat) -> tuple[EncodedSet, Lengths]:
        encode = cached_encode_rows if self.cache_tokens else encode_rows
        with naming(name):
            return encode(rows, row_format, self.tokenizer, **self.settings)


def source_names(dataset_name: str | Sequence[str], weights: Sequence[float] | None) -> tuple[str, ...]:
    """The names as a tuple. Raises `InputError` if there is none, or not one weight for each."""
    names = (dataset_name,) if isinstance(dataset_name, str) else tuple(dataset_name)
    if not names:
        raise InputError("dataset_name names no data set.")
    if weights is not None and (len(weights) != len(names) or min(weights) <= 0):
        raise InputError(f"dataset_weights {list(weights)}: give a positive number for each of the {len(names)} data sets.")
    return names


def detected(name: str, row: Row, told: dict[str, Any]) -> RowFormat:
    """`RowFormat.detect` with what the settings say. Raises `InputError`, naming the data set."""
    with naming(name):
        return RowFormat.detect(row, **told)


def classes_of(
    data: Sequence[tuple[str, Sequence[Row]]], formats: Sequence[RowFormat], num_labels: int | None = None
) -> tuple[str, ...]:
    """A classifier's classes, from the labels of all rows and what the user says of their number."""
    labels, places = [], []
    for (name, rows), row_format in zip(data, formats, strict=True):
        if row_format.kind == "classification":
            with naming(name):
                for number, row in enumerate(rows, 1):
                    row_format.check(row, number)
            labels += [row[row_format.fields[-1]] for row in rows]
            places += [(name, number) for number in range(1, len(rows) + 1)]
    return find_classes(labels, num_labels, lambda place: f"{places[place][0]}: Row {places[place][1]}")


def prompts_of(
    numbers: np.ndarray,
    sources: np.ndarray,
    rows_of: Sequence[Sequence[Row]],
    formats: Sequence[RowFormat],
    tokenizer: Any,
    kept: int,
) -> list[tuple[str, str]]:
    """Question and expected answer, or text and label, of the first rows of each data set that has questions."""
    asking = [n for n, row_format in enumerate(formats) if not row_format.is_plain]
    each = -(-kept // max(1, len(asking)))
    chosen = [(n, number) for n in asking for number in numbers[sources == n][:each]][:kept]
    return [_prompt_of(rows_of[n][number - 1], formats[n], tokenizer) for n, number in chosen]


def _prompt_of(row: Row, row_format: RowFormat, tokenizer: Any) -> tuple[str, str]:
    if row_format.kind != "classification":
        return row_format.question_and_answer(row, tokenizer)
    *texts, label = row_format.fields
    return "\n".join(row[name] for name in texts), str(row[label])


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Errors of the block begin with the data set's name, unless they hold it."""
    try:
        yield
    except InputError as error:
        if name in str(error):
            raise
        raise InputError(f"{name}: {error}") from error
