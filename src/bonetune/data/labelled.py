"""Rows to examples for classifiers and for sequence-to-sequence models, whose labels are no continuation of their input."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from bonetune.data.examples import IGNORED, Encoded
from bonetune.data.formats import RowFormat
from bonetune.data.tokens import NumberedRow
from bonetune.errors import InputError

Label = str | int | float


def classification_examples(
    rows: Sequence[NumberedRow],
    row_format: RowFormat,
    tokenizer: Any,
    classes: Sequence[str],
    max_length: int | None = None,
    side: Literal["left", "right"] = "right",
) -> list[Encoded]:
    """The text, or pair of texts, of each row with the tokenizer's special tokens, and one label.

    Args:
        rows: number and content of each.
        row_format: how to read them.
        tokenizer: the model's.
        classes: their names, as `find_classes` gives them; none for regression.
        max_length: where texts are cut off; the special tokens stay.
        side: on which side.

    Raises:
        InputError: a label that is not among the classes, or no number where numbers are to be predicted.
    """
    *texts, label = row_format.fields
    columns = [[row[name] for _, row in rows] for name in texts]
    ids = _special(tokenizer, columns, max_length, side)
    labels = [_class(row[label], classes, number) for number, row in rows]
    return [Encoded(tokens, [value], number) for tokens, value, (number, _) in zip(ids, labels, rows, strict=True)]


def rewriting_examples(
    rows: Sequence[NumberedRow],
    row_format: RowFormat,
    tokenizer: Any,
    max_length: int | None = None,
    side: Literal["left", "right"] = "right",
) -> list[Encoded]:
    """The prompt of each row with the tokenizer's special tokens, and as labels the answer with the end-of-text token.

    Args:
        rows: number and content of each.
        row_format: how to read them.
        tokenizer: the model's.
        max_length: where prompts are cut off, on `side`, and answers, at their end.
        side: of prompts.
    """
    pairs = [row_format.question_and_answer(row, tokenizer) for _, row in rows]
    ids = _special(tokenizer, [[prompt for prompt, _ in pairs]], max_length, side)
    answers = tokenizer(text_target=[answer for _, answer in pairs], verbose=False).input_ids
    end = tokenizer.eos_token_id
    ended = [answer if answer[-1:] == [end] else [*answer, end] for answer in answers]
    return [Encoded(tokens, labels[:max_length], number) for tokens, labels, (number, _) in zip(ids, ended, rows, strict=True)]


def find_classes(
    labels: Sequence[Label], num_labels: int | None = None, called: Callable[[int], str] = "label number {}".format
) -> tuple[str, ...]:
    """The names of the classes, sorted; none if the labels are numbers to be predicted.

    Labels are to be predicted if all are numbers and one of them is no integer (1.0 is none). Texts that say numbers, as
    those of a CSV file do, are taken for numbers. Where there are to be several classes, 1.0 is the class 1.

    Args:
        labels: of all rows.
        num_labels: how many classes there are; 1: the labels are numbers to be predicted; None: as many as are found.
        called: what errors call the row of the label with a number, from 0.

    Raises:
        InputError: texts among numbers, or as many classes as `num_labels` cannot be told from the labels.
    """
    if num_labels == 1:
        return ()
    _check_not_mixed(labels, called)
    classes = _found(labels, several=num_labels is not None)
    if num_labels in (None, len(classes)):
        return classes
    numbered = tuple(str(number) for number in range(num_labels))
    if classes and set(classes) <= set(numbered):
        return numbered
    which = f"there are {len(classes)} classes in the data" if classes else "the labels are numbers to be predicted"
    raise InputError(f"num_labels is {num_labels}, and {which}: leave it out, or label rows 0 to {num_labels - 1}.")


def _check_not_mixed(labels: Sequence[Label], called: Callable[[int], str]) -> None:
    # a boolean is no number, but equal to one: told apart by type
    first: dict[tuple[type, Label], int] = {}
    for place, label in enumerate(labels):
        first.setdefault((type(label), label), place)
    texts = [key for key in first if _number(key[1]) is None]
    if texts and len(texts) < len(first):
        odd, other = texts[0], next(key for key in first if _number(key[1]) is not None)
        raise InputError(
            f"{called(first[odd])}: label {odd[1]!r} is no number, and {other[1]!r} ({called(first[other])}) is one: "
            "let all labels be numbers, or all names of classes."
        )


def _found(labels: Sequence[Label], several: bool) -> tuple[str, ...]:
    found = set(labels)
    numbers = [_number(label) for label in found]
    if any(number is None for number in numbers):
        return tuple(sorted({str(label) for label in found}))
    if any(isinstance(number, float) for number in numbers):
        whole = {int(number) for number in numbers if number is not None and float(number).is_integer()}
        return tuple(map(str, sorted(whole))) if several and all(number in whole for number in numbers) else ()
    return tuple(sorted({str(label) for label in found}, key=lambda name: (int(name), name)))


def _class(label: Label, classes: Sequence[str], number: int) -> int | float:
    if classes:
        value = _number(label)
        names = [str(label), *([str(int(value))] if value is not None and float(value).is_integer() else [])]
        for name in names:
            if name in classes:
                return list(classes).index(name)
        raise InputError(f"Row {number}: label {label!r} is not among the classes {', '.join(classes)}.")
    value = _number(label)
    if value is None:
        raise InputError(f"Row {number}: label {label!r} is no number, and numbers are to be predicted.")
    if value == IGNORED:
        raise InputError(f"Row {number}: label {label!r} stands for no label at all in training: scale or shift the labels.")
    return float(value)


def _number(label: Label) -> int | float | None:
    if not isinstance(label, str):
        return None if isinstance(label, bool) else label
    try:
        value = float(label)
    except ValueError:
        return None
    if not math.isfinite(value):
        return None
    return int(label) if label.strip().lstrip("+-").isdecimal() else value


def _special(tokenizer: Any, columns: Sequence[list[str]], max_length: int | None, side: str) -> list[list[int]]:
    """Token ids of the texts, or of the pairs, with special tokens."""
    if max_length is None:
        return tokenizer(*columns, verbose=False).input_ids
    with _truncating(tokenizer, side):
        return tokenizer(*columns, truncation=True, max_length=max_length, verbose=False).input_ids


@contextmanager
def _truncating(tokenizer: Any, side: str) -> Iterator[None]:
    before, tokenizer.truncation_side = tokenizer.truncation_side, side
    try:
        yield
    finally:
        tokenizer.truncation_side = before
