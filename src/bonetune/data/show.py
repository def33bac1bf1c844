"""An example as people read it: its text, and which of it is supervised."""

from typing import Any

from bonetune.data.examples import IGNORED, Encoded


def pieces(example: Encoded, tokenizer: Any) -> list[tuple[str, bool]]:
    """The example's text in runs that are supervised or not; joined, they are what the tokenizer decodes it to.

    A first token, which no causal language model predicts, counts as not supervised. The answer of a sequence-to-sequence
    example follows its input; a classifier's input has nothing supervised in it.
    """
    ids, labels = example.input_ids, example.labels
    if len(labels) != len(ids) or any(label not in (IGNORED, token) for token, label in zip(ids, labels, strict=True)):
        answer = (
            [(_decode(tokenizer, labels), True)] if all(isinstance(label, int) for label in labels) and len(labels) > 1 else []
        )
        return [(_decode(tokenizer, ids), False), *answer]
    supervised = [False, *(label != IGNORED for label in labels[1:])]
    edges = [i for i in range(1, len(ids)) if supervised[i] != supervised[i - 1]]
    whole = _decode(tokenizer, ids)
    # a character of several bytes may lie across an edge: it goes to the run that ends it
    cuts = [_common(_decode(tokenizer, ids[:edge]), whole) for edge in edges]
    bounds = zip([0, *cuts], [*cuts, len(whole)], [0, *edges], strict=True)
    return [(whole[start:stop], supervised[first]) for start, stop, first in bounds if start < stop]


def marked(example: Encoded, tokenizer: Any) -> str:
    """The example as plain text, with what is supervised between ⟦ and ⟧."""
    return "".join(f"⟦{text}⟧" if supervised else text for text, supervised in pieces(example, tokenizer))


def _common(first: str, second: str) -> int:
    """Number of characters that both begin with."""
    return next((n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))


def _decode(tokenizer: Any, ids: Any) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
