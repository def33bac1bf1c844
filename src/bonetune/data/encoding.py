"""Rows to examples of at most so many tokens, and those to padded batches."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np

from bonetune.data.examples import IGNORED, Encoded, EncodedSet
from bonetune.data.formats import RowFormat, TaskName
from bonetune.data.labelled import classification_examples, rewriting_examples
from bonetune.data.tokens import NumberedRow, causal_examples
from bonetune.errors import InputError

Truncation = Literal["error", "drop", "left", "right", "split"]
# To be raised when the same rows and settings come to make other examples: cached ones are made anew then.
VERSION = 2
# Rows tokenized at a time: a fast tokenizer takes the texts of a list side by side.
CHUNK = 256
# What `Lengths` counts of rows that are not in a set as they were.
COUNTS = ("dropped", "truncated", "empty", "silenced")


@dataclass(frozen=True)
class Lengths:
    """What a data set looks like in tokens, for people.

    Args:
        examples: how many there are.
        tokens: of all inputs.
        supervised: tokens that the loss is computed on; of a classifier, examples.
        longest: tokens of the longest example.
        dropped: rows that were longer and left out.
        truncated: rows that were longer and cut.
        empty: rows of plain text, or of token ids, with nothing in them to learn, left out.
        silenced: rows that were longer and lost all that is supervised when they were cut, left out.
    """

    examples: int
    tokens: int
    supervised: int
    longest: int
    dropped: int = 0
    truncated: int = 0
    empty: int = 0
    silenced: int = 0

    @classmethod
    def of(cls, examples: EncodedSet, task_type: TaskName = "CAUSAL_LM", **counts: int) -> "Lengths":
        """Those of a set; `counts` are of the rows that are not in it as they were."""
        causal = task_type == "CAUSAL_LM"
        return cls(
            examples=len(examples),
            tokens=int(examples.lengths.sum()),
            supervised=int((examples.supervised if causal else examples.labelled).sum()),
            longest=int(examples.lengths.max(initial=0)),
            **counts,
        )


def encode_rows(
    rows: Sequence[dict[str, Any]],
    row_format: RowFormat,
    tokenizer: Any,
    max_length: int,
    truncation: Truncation = "error",
    *,
    completion_only_loss: bool = True,
    task_type: TaskName = "CAUSAL_LM",
    classes: Sequence[str] = (),
) -> tuple[EncodedSet, Lengths]:
    """Tokenize and mask a data set.

    Args:
        rows: the rows.
        row_format: how to read them.
        tokenizer: a Hugging Face tokenizer with an end-of-text token.
        max_length: largest number of tokens of an example.
        truncation: what becomes of longer ones: `error` refuses the data set, `drop` leaves them out, `left` cuts off their
            beginning, `right` their end (and with it the end-of-text token), `split` cuts plain text (or its ids) into several,
            each of which begins with the last token of the one before, so that every token is predicted once. Where nothing
            supervised is left of one that was cut, it is left out.
        completion_only_loss: whether a causal language model's prompts are masked.
        task_type: what the model is for.
        classes: a classifier's, as `bonetune.data.labelled.find_classes` gives them.

    Raises:
        InputError: rows that do not fit the format, examples longer than max_length, or no example that is not.
    """
    _check_settings(row_format, tokenizer, max_length, truncation, task_type)
    outcomes = Counter[str]()

    def made() -> Iterator[Encoded]:
        for examples, outcome in _made(
            rows, row_format, tokenizer, max_length, truncation, completion_only_loss, task_type, classes
        ):
            outcomes[outcome] += 1
            yield from examples

    examples = EncodedSet(made())
    if outcomes["long"]:
        sizes = np.sort(np.maximum(examples.lengths, examples.labelled))
        modes = "drop, left, right or split" if row_format.is_plain else "drop, left or right"
        raise InputError(
            f"{outcomes['long']} of {len(sizes)} examples are longer than max_length={max_length} tokens (99th percentile "
            f"{sizes[min(len(sizes) - 1, int(0.99 * len(sizes)))]}, longest {sizes[-1]}). Raise max_length, or choose "
            f"truncation: {modes}."
        )
    if not len(examples):
        if outcomes["dropped"]:
            raise InputError(f"All {outcomes['dropped']} examples are longer than max_length={max_length}: raise max_length.")
        if outcomes["silenced"]:
            raise InputError(
                f"All {outcomes['silenced']} examples have no supervised token left when they are cut to "
                f"max_length={max_length} (truncation: {truncation}): raise max_length."
            )
        raise InputError("No row has any text." if row_format.kind != "tokens" else "No row has two tokens or more.")
    return examples, Lengths.of(examples, task_type, **counts_of(outcomes))


def counts_of(outcomes: Mapping[str, int]) -> dict[str, int]:
    """The counts of `Lengths` among what became of rows."""
    return {name: outcomes.get(name, 0) for name in COUNTS}


def encode_stream(
    rows: Iterable[dict[str, Any]],
    row_format: RowFormat,
    tokenizer: Any,
    max_length: int,
    truncation: Truncation = "drop",
    *,
    completion_only_loss: bool = True,
    task_type: TaskName = "CAUSAL_LM",
    classes: Sequence[str] = (),
    outcomes: Counter[str] | None = None,
) -> Iterator[Encoded]:
    """The examples of `encode_rows`, made as they are asked for, `CHUNK` rows at a time.

    What becomes of each row is counted in `outcomes`, under the names of `Lengths`.

    Raises `InputError` at once for truncation: error, which needs to have seen all rows, and for a bad row when it comes.
    """
    _check_settings(row_format, tokenizer, max_length, truncation, task_type)
    if truncation == "error":
        raise InputError("A stream meets long examples under way (truncation: error): choose drop, left or right.")
    made = _made(rows, row_format, tokenizer, max_length, truncation, completion_only_loss, task_type, classes)
    counted = Counter[str]() if outcomes is None else outcomes

    def examples_of() -> Iterator[Encoded]:
        for examples, outcome in made:
            counted[outcome] += 1
            yield from examples

    return examples_of()


def _check_settings(
    row_format: RowFormat, tokenizer: Any, max_length: int, truncation: Truncation, task_type: TaskName
) -> None:
    if tokenizer.eos_token_id is None and task_type != "SEQ_CLS":
        raise InputError("The tokenizer has no end-of-text token, so a model could never learn to stop: set eos_token.")
    if truncation == "split" and not row_format.is_plain:
        raise InputError(f"truncation: split is for plain text, not for {row_format.kind}: choose drop, left or right.")
    if truncation == "split" and max_length < 2:
        raise InputError(f"truncation: split needs a max_length of 2 or more, not {max_length}.")


def _made(
    rows: Iterable[dict[str, Any]],
    row_format: RowFormat,
    tokenizer: Any,
    max_length: int,
    truncation: Truncation,
    completion_only_loss: bool,
    task_type: TaskName,
    classes: Sequence[str],
) -> Iterator[tuple[list[Encoded], str]]:
    """What each row becomes, and what happened to it: whole, long (and refused later), or one of `COUNTS`."""

    def examples_of(chunk: list[NumberedRow], longest: int | None = None) -> list[Encoded]:
        side = "left" if truncation == "left" else "right"
        if task_type == "SEQ_CLS":
            return classification_examples(chunk, row_format, tokenizer, classes, longest, side)
        if task_type == "SEQ_2_SEQ_LM":
            return rewriting_examples(chunk, row_format, tokenizer, longest, side)
        return causal_examples(chunk, row_format, tokenizer, completion_only_loss)

    numbered = enumerate(rows, 1)
    while chunk := list(islice(numbered, CHUNK)):
        for number, row in chunk:
            row_format.check(row, number)
        full = [(number, row) for number, row in chunk if not row_format.is_blank(row)]
        yield from (([], "empty") for _ in range(len(chunk) - len(full)))
        for numbered_row, example in zip(full, examples_of(full), strict=True):
            if max(len(example.input_ids), len(example.labels)) <= max_length:
                yield [example], "whole"
            elif truncation == "error":
                yield [example], "long"
            elif truncation == "drop":
                yield [], "dropped"
            elif task_type == "CAUSAL_LM":
                cut = _cut(example, max_length, truncation)
                silenced = example.supervised and not any(part.supervised for part in cut)
                yield ([], "silenced") if silenced else (cut, "truncated")
            else:
                yield examples_of([numbered_row], max_length), "truncated"


def _cut(example: Encoded, max_length: int, truncation: Truncation) -> list[Encoded]:
    size = len(example.input_ids)
    if truncation == "left":
        starts = [size - max_length]
    elif truncation == "right":
        starts = [0]
    else:
        starts = list(range(0, size - 1, max_length - 1))
    return [_part(example, start, start + max_length) for start in starts]


def _part(example: Encoded, start: int, stop: int) -> Encoded:
    labels = example.labels[start + 1 : stop]
    return Encoded(example.input_ids[start:stop], [IGNORED, *labels], example.row)
