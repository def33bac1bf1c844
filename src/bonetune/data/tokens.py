"""Rows to the tokens a causal language model is trained on.

A row's segments are tokenized apart and joined, so that in training the model sees a prompt's tokens exactly as it will see
them when it answers. From a conversation's second turn on, it will see what went before tokenized as one text; where that makes
other tokens, they are taken. Token ids that a row gives itself are taken as they are.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from bonetune.data.conversation import Segment
from bonetune.data.examples import IGNORED, Encoded
from bonetune.data.formats import RowFormat
from bonetune.errors import InputError

NumberedRow = tuple[int, dict[str, Any]]


def causal_examples(
    rows: Sequence[NumberedRow], row_format: RowFormat, tokenizer: Any, completion_only_loss: bool = True
) -> list[Encoded]:
    """Each row's whole text as token ids, with labels where it is supervised (everywhere without `completion_only_loss`).

    Args:
        rows: number and content of each.
        row_format: how to read them.
        tokenizer: with an end-of-text token.
        completion_only_loss: whether prompts are masked.

    Raises:
        InputError: a row that cannot be rendered, or whose token ids are not the tokenizer's, with its number.
    """
    if row_format.kind == "tokens":
        words = len(tokenizer)
        return [_given(row[row_format.fields[0]], number, words) for number, row in rows]
    of_rows = [_segments(row, number, row_format, tokenizer) for number, row in rows]
    pieces = iter(token_ids(tokenizer, [segment.text for segments in of_rows for segment in segments]))
    joined = [_join([(next(pieces), segment.supervised) for segment in segments]) for segments in of_rows]
    later = [place for place, (_, row) in enumerate(rows) if len(of_rows[place]) > 2 and row_format.is_conversation(row)]
    together = token_ids(tokenizer, ["".join(segment.text for segment in of_rows[place][:-1]) for place in later])
    for place, seen in zip(later, together, strict=True):
        if joined[place][0][: len(seen)] != seen:
            joined[place] = _as_seen(of_rows[place], seen, rows[place][0], tokenizer)
    opening = opening_tokens(tokenizer)
    examples = []
    for (number, row), (ids, labels) in zip(rows, joined, strict=True):
        labels = labels if completion_only_loss else list(ids)
        # a chat template opens a text itself
        if not row_format.is_conversation(row) and ids[: len(opening)] != opening:
            ids, labels = opening + ids, [IGNORED] * len(opening) + labels
        examples.append(Encoded(ids, [IGNORED] * len(labels[:1]) + labels[1:], number))
    return examples


def prompt_tokens(tokenizer: Any, prompt: str, *, opened: bool = False) -> list[int]:
    """A prompt's token ids as training saw them: as it is if a chat template `opened` it, else opened by the tokenizer.

    Raises `InputError` if there are none, so that a model would have nothing to go on from.
    """
    opening, (ids,) = opening_tokens(tokenizer), token_ids(tokenizer, [prompt])
    ids = ids if opened or ids[: len(opening)] == opening else opening + ids
    if not ids:
        raise InputError("An empty prompt, and a tokenizer without an opening token: there is nothing to go on from.")
    return ids


def opening_tokens(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer itself puts before a text (a BOS token, or nothing)."""
    (bare,), full = token_ids(tokenizer, ["a"]), tokenizer("a").input_ids
    return full[: full.index(bare[0])] if bare and bare[0] in full else []


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of each text, without opening or closing tokens."""
    return tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids if texts else []


def _given(ids: Sequence[Any] | np.ndarray, number: int, words: int) -> Encoded:
    """The example of a row's own ids, all of them supervised but the first."""
    listed = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
    if set(map(type, listed)) != {int} or min(listed) < 0 or max(listed) >= words:
        for token in listed:
            if isinstance(token, bool) or not isinstance(token, int | np.integer) or not 0 <= token < words:
                raise InputError(
                    f"Row {number}: {token!r:.40} is no id of this tokenizer's vocabulary, which has {words} tokens (0 to "
                    f"{words - 1}): tokenize the data by the model's own tokenizer."
                )
        listed = [int(token) for token in listed]
    return Encoded(listed, [IGNORED] * len(listed[:1]) + listed[1:], number)


def _segments(row: dict[str, Any], number: int, row_format: RowFormat, tokenizer: Any) -> list[Segment]:
    try:
        return row_format.segments(row, tokenizer)
    except InputError as error:
        raise InputError(f"Row {number}: {error}") from error


def _join(pieces: Sequence[tuple[list[int], bool]]) -> tuple[list[int], list[int]]:
    """Token ids and labels of the pieces, one after the other."""
    ids, labels = [], []
    for tokens, supervised in pieces:
        ids += tokens
        labels += tokens if supervised else [IGNORED] * len(tokens)
    return ids, labels


def _as_seen(segments: Sequence[Segment], seen: list[int], number: int, tokenizer: Any) -> tuple[list[int], list[int]]:
    """A conversation's ids and labels with what comes before its last answer tokenized as one text: `seen`."""
    *before, last = segments
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"Row {number}: tokenized as one text, this conversation has other tokens than turn by turn, and this tokenizer "
            "does not say which belong to whom. Use a fast tokenizer, or conversations of one turn."
        )
    text, (answer,) = "".join(segment.text for segment in before), token_ids(tokenizer, [last.text])
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False).offset_mapping
    spans, start = [], 0
    for segment in before:
        if segment.supervised:
            spans.append((start, start + len(segment.text)))
        start += len(segment.text)
    # a token that reaches out of the answer is not the assistant's alone
    owned = [any(first <= begin < end <= stop for first, stop in spans) for begin, end in offsets]
    labels = [token if own else IGNORED for token, own in zip(seen, owned, strict=True)]
    return seen + answer, labels + answer
