"""Batched greedy generation."""

import math
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from bonetune.data import prompt_tokens
from bonetune.errors import InputError
from bonetune.models.greedy import end_tokens, greedy

# So many of a prompt's last tokens are decoded with its continuation: more than a character's bytes.
_BEFORE = 16


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    opened: bool = False,
    stop: Sequence[str] = (),
    on_batch: Callable[[int], None] | None = None,
) -> list[str]:
    """The model's greedy continuation of each prompt, or answer to it, without special tokens, in the order of the prompts.

    A continuation is literal: the white space that it begins with is in it. Warns if logits are not finite.

    Args:
        model: a causal language model or an encoder-decoder; it is put into evaluation mode and back.
        tokenizer: its tokenizer.
        prompts: texts.
        max_new_tokens: where a continuation ends at the latest; earlier if the model takes no more tokens.
        opened: whether the prompts are a chat template's, which opens a text itself.
        stop: texts at the first of which a continuation ends; it is left out.
        batch_size: prompts at a time; prompts of like length go together, the longest first.
        on_batch: called with the number of prompts done since the last call.

    Raises:
        InputError: an empty prompt, with a tokenizer that opens texts with nothing, or one longer than the model takes.
    """
    answers = [""] * len(prompts)
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "opened": opened, "stop": stop}
    for batch in generate_batches(model, tokenizer, prompts, **settings):
        for number, answer in batch.items():
            answers[number] = answer.text
        if on_batch is not None:
            on_batch(len(batch))
    return answers


class Answer(NamedTuple):
    """What a prompt was answered with, and whether the answer came to its end: else it was cut off."""

    text: str
    complete: bool


@torch.inference_mode()
def generate_batches(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    opened: bool = False,
    stop: Sequence[str] = (),
    cut_left: bool = False,
    done: Collection[int] = (),
) -> Iterator[dict[int, Answer]]:
    """The answers of `generate` batch by batch, each under the number of its prompt; the longest prompts first.

    Which prompts go together depends on all of them, and `done` only leaves out the batches that are in it: an answer is the
    same, to the last digit, whether one goes on from what is done or begins anew. Prompts that leave their answers less room
    than `max_new_tokens` go together with those alone that leave as much, so that no answer is shortened by another's prompt.

    With `cut_left`, a prompt that is too long loses its beginning, so that `max_new_tokens` may follow it.
    """
    ids = [input_tokens(model, tokenizer, prompt, opened=opened) for prompt in prompts]
    room = getattr(model.config, "max_position_embeddings", None) or math.inf
    if cut_left and room > max_new_tokens:
        ids = [tokens[-int(min(len(tokens), room - max_new_tokens)) :] for tokens in ids]
    if too_long := [number for number, tokens in enumerate(ids) if len(tokens) >= room]:
        number = too_long[0]
        raise InputError(
            f"Prompt {number + 1} has {len(ids[number])} tokens, and the model takes {room} with its answer ({len(too_long)} "
            f"of {len(ids)} prompts are too long): leave such prompts out, or shorten them."
        )
    most = [int(min(max_new_tokens, room - len(tokens))) for tokens in ids]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    was_training = model.training
    model.eval()
    try:
        for _, alike in groupby(order, key=lambda i: most[i]):
            for batch in _batched(list(alike), batch_size):
                if not all(number in done for number in batch):
                    answers = _answers(model, tokenizer, [ids[i] for i in batch], most[batch[0]], stop)
                    yield dict(zip(batch, answers, strict=True))
    finally:
        model.train(was_training)


def _batched(numbers: list[int], size: int) -> Iterator[list[int]]:
    return (numbers[start : start + size] for start in range(0, len(numbers), size))


def _answers(model: Any, tokenizer: Any, ids: list[list[int]], max_new_tokens: int, stop: Sequence[str]) -> list[Answer]:
    """What one batch of prompts is answered with."""
    encoder_decoder = model.config.is_encoder_decoder
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    longest = max(map(len, ids))
    side = "right" if encoder_decoder else "left"
    rows = torch.tensor([_filled(tokens, pad, longest, side) for tokens in ids], device=model.device)
    mask = torch.tensor([_filled([1] * len(tokens), 0, longest, side) for tokens in ids], device=model.device)
    begin = 0 if encoder_decoder else longest
    finite = _Finite()
    watching: dict[str, Any] = {"logits_processor": LogitsProcessorList([finite])}
    if stop:
        watching["stopping_criteria"] = StoppingCriteriaList([_Stop(tokenizer, stop, begin)])
    out = greedy(model, tokenizer, rows, mask, max_new_tokens, **watching)[:, begin:]
    if not finite.always:
        warnings.warn("The model's logits are not finite: its weights are ruined, and its answers mean nothing.", stacklevel=2)
    before: list[list[int]] = [[]] * len(ids) if encoder_decoder else ids
    texts = [continuation(tokenizer, prompt, row) for prompt, row in zip(before, out.tolist(), strict=True)]
    ends = torch.tensor(end_tokens(model, tokenizer), device=out.device)
    ended = torch.isin(out[:, int(encoder_decoder) :], ends).any(1).tolist()  # a decoder may begin with such a token
    return [Answer(answer := cut(text, stop), done or answer != text) for text, done in zip(texts, ended, strict=True)]


def continuation(tokenizer: Any, before: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of tokens that follow others, without special ones.

    Decoded alone it might lack a space that it begins with: SentencePiece's decoders take one off whatever they decode. Where
    the text before it changes by what follows (a character torn between byte tokens), it is decoded alone all the same.
    """
    near = list(before[-_BEFORE:])
    head = tokenizer.decode(near, skip_special_tokens=True)
    whole = tokenizer.decode([*near, *tokens], skip_special_tokens=True)
    return whole[len(head) :] if whole.startswith(head) else tokenizer.decode(tokens, skip_special_tokens=True)


def cut(text: str, stop: Sequence[str]) -> str:
    """A text up to the first of the `stop` texts in it."""
    ends = [place for place in (text.find(end) for end in stop) if place >= 0]
    return text[: min(ends)] if ends else text


class _Stop(StoppingCriteria):
    """Ends a row once one of the texts `stop` stands in what was generated for it, from token `begin` on."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], begin: int) -> None:
        self.tokenizer, self.stop, self.begin = tokenizer, stop, begin
        # in bytes, for a token may be a part of a character; the last one is the newest
        self.tail = max(len(end.encode()) for end in stop) + 1

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        tails = input_ids[:, max(self.begin, input_ids.shape[1] - self.tail) :].tolist()
        texts = [self.tokenizer.decode(tail, skip_special_tokens=True) for tail in tails]
        found = [any(end in text for end in self.stop) for text in texts]
        return torch.tensor(found, dtype=torch.bool, device=input_ids.device)


class _Finite(LogitsProcessor):
    """Changes no logits, and notes whether all of them, of each row's next token, had a largest one that is a number."""

    def __init__(self) -> None:
        self._seen: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        finite = scores.amax(-1).isfinite().all()  # a tensor: asking the device at every token would slow it down
        self._seen = finite if self._seen is None else self._seen & finite
        return scores

    @property
    def always(self) -> bool:
        """Whether they had."""
        return self._seen is None or bool(self._seen)


def input_tokens(model: Any, tokenizer: Any, text: str, *, opened: bool = False) -> list[int]:
    """A text's token ids as the model was trained on them: to go on from, or whole, with the tokenizer's special tokens."""
    goes_on = model.can_generate() and not model.config.is_encoder_decoder
    return prompt_tokens(tokenizer, text, opened=opened) if goes_on else tokenizer(text, verbose=False).input_ids


def _filled(values: list[int], filling: int, length: int, side: str) -> list[int]:
    missing = [filling] * (length - len(values))
    return missing + values if side == "left" else values + missing
