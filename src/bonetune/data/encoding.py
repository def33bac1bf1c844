"""Rows to token ids with labels, and those to padded batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bonetune.data.formats import RowFormat, Segment
from bonetune.errors import InputError

IGNORED = -100  # the label of a token that is not supervised, as everywhere in transformers
Truncation = Literal["error", "drop", "left", "right"]


@dataclass(frozen=True)
class Encoded:
    """One example: token ids, labels equal to them where supervised, else `IGNORED`, and its row's number from 1."""

    input_ids: list[int]
    labels: list[int]
    row: int = 0

    @property
    def supervised(self) -> int:
        """Number of tokens the loss is computed on: the first token of a sequence is never predicted."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class Lengths:
    """What a data set looks like in tokens, for people."""

    examples: int
    tokens: int
    supervised: int
    longest: int
    dropped: int = 0


def encode_rows(
    rows: Sequence[dict[str, Any]],
    row_format: RowFormat,
    tokenizer: Any,
    max_length: int,
    truncation: Truncation = "error",
) -> tuple[list[Encoded], Lengths]:
    """Tokenize, mask and check a data set.

    Args:
        rows: the rows.
        row_format: how to read them.
        tokenizer: a Hugging Face tokenizer with an end-of-text token.
        max_length: largest number of tokens of an example.
        truncation: what becomes of longer ones: `error` refuses the data set, `drop` leaves them out, `left` cuts off their
            beginning, `right` their end (and with it the end-of-text token).

    Raises:
        InputError: rows that do not fit the format, examples longer than max_length, or examples without a supervised token.
    """
    if tokenizer.eos_token_id is None:
        raise InputError("The tokenizer has no end-of-text token, so a model could never learn to stop: set eos_token.")
    # a chat template opens a text itself
    opening = [] if row_format.kind == "messages" else opening_tokens(tokenizer)
    encoded = []
    for number, row in enumerate(rows, 1):
        row_format.check(row, number)
        ids, labels = _join(opening, row_format.segments(row, tokenizer), tokenizer)
        encoded.append(Encoded(ids, labels, number))
    kept = _fit(encoded, max_length, truncation)
    if not kept:
        raise InputError(f"All {len(encoded)} examples are longer than max_length={max_length}: raise max_length.")
    silent = [example.row for example in kept if not example.supervised]
    if silent:
        raise InputError(
            f"{len(silent)} of {len(kept)} examples have no supervised token (the first is row {silent[0]}): their loss "
            "would be zero and nothing would be learned. Check for empty answers, and max_length and truncation."
        )
    return kept, Lengths(
        examples=len(kept),
        tokens=sum(len(e.input_ids) for e in kept),
        supervised=sum(e.supervised for e in kept),
        longest=max(len(e.input_ids) for e in kept),
        dropped=len(encoded) - len(kept),
    )


def _join(opening: list[int], segments: Sequence[Segment], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids and labels of the opening tokens and the segments."""
    ids, labels = list(opening), [IGNORED] * len(opening)
    for segment in segments:
        tokens = tokenizer(segment.text, add_special_tokens=False).input_ids
        ids += tokens
        labels += tokens if segment.supervised else [IGNORED] * len(tokens)
    return ids, labels


def prompt_tokens(tokenizer: Any, prompt: str) -> list[int]:
    """A prompt's token ids as training saw them: with the tokenizer's opening tokens, once.

    Raises `InputError` if there are none, so that a model would have nothing to go on from.
    """
    opening, ids = opening_tokens(tokenizer), tokenizer(prompt, add_special_tokens=False).input_ids
    ids = ids if ids[: len(opening)] == opening else opening + ids
    if not ids:
        raise InputError("An empty prompt, and a tokenizer without an opening token: there is nothing to go on from.")
    return ids


def opening_tokens(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer itself puts before a text (a BOS token, or nothing)."""
    bare, full = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    return full[: full.index(bare[0])] if bare and bare[0] in full else []


def _fit(examples: list[Encoded], max_length: int, truncation: Truncation) -> list[Encoded]:
    lengths = sorted(len(e.input_ids) for e in examples)
    too_long = sum(length > max_length for length in lengths)
    if not too_long:
        return examples
    match truncation:
        case "error":
            percentile = lengths[min(len(lengths) - 1, int(0.99 * len(lengths)))]
            raise InputError(
                f"{too_long} of {len(lengths)} examples are longer than max_length={max_length} tokens (99th percentile "
                f"{percentile}, longest {lengths[-1]}). Raise max_length, or choose truncation: drop, left or right."
            )
        case "drop":
            return [e for e in examples if len(e.input_ids) <= max_length]
        case "left":
            return [Encoded(e.input_ids[-max_length:], e.labels[-max_length:], e.row) for e in examples]
        case "right":
            return [Encoded(e.input_ids[:max_length], e.labels[:max_length], e.row) for e in examples]


def collate(pad_token_id: int) -> Callable[[Sequence[Encoded]], dict[str, Tensor]]:
    """A collator: right-padded `input_ids`, `attention_mask` and `labels`, each (batch, longest), int64.

    Padding is masked by position, never by id, so that a padding token that is also the end of text stays supervised.
    """

    def batch(examples: Sequence[Encoded]) -> dict[str, Tensor]:
        longest = max(len(e.input_ids) for e in examples)

        def padded(rows: Sequence[list[int]], value: int) -> Tensor:
            return torch.tensor([row + [value] * (longest - len(row)) for row in rows])

        return {
            "input_ids": padded([e.input_ids for e in examples], pad_token_id),
            "attention_mask": padded([[1] * len(e.input_ids) for e in examples], 0),
            "labels": padded([e.labels for e in examples], IGNORED),
        }

    return batch
