"""Batched greedy generation."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from bonetune.data import prompt_tokens
from bonetune.models.greedy import greedy


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    opened: bool = False,
    on_batch: Callable[[int], None] | None = None,
) -> list[str]:
    """The model's greedy continuation of each prompt, or answer to it, without special tokens, in the order of the prompts.

    Args:
        model: a causal language model or an encoder-decoder; it is put into evaluation mode and back.
        tokenizer: its tokenizer.
        prompts: texts.
        max_new_tokens: where a continuation ends at the latest.
        opened: whether the prompts are a chat template's, which opens a text itself.
        batch_size: prompts at a time; prompts of like length go together.
        on_batch: called with the number of prompts done since the last call.

    Raises:
        InputError: an empty prompt, with a tokenizer that opens texts with nothing.
    """
    ids = [input_tokens(model, tokenizer, prompt, opened=opened) for prompt in prompts]
    encoder_decoder = model.config.is_encoder_decoder
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    answers = [""] * len(ids)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            longest = max(len(ids[i]) for i in batch)
            side = "right" if encoder_decoder else "left"
            rows = torch.tensor([_filled(ids[i], pad, longest, side) for i in batch], device=model.device)
            mask = torch.tensor([_filled([1] * len(ids[i]), 0, longest, side) for i in batch], device=model.device)
            out = greedy(model, tokenizer, rows, mask, max_new_tokens)
            for i, row in zip(batch, out, strict=True):
                answers[i] = tokenizer.decode(row if encoder_decoder else row[longest:], skip_special_tokens=True)
            if on_batch is not None:
                on_batch(len(batch))
    finally:
        model.train(was_training)
    return answers


def input_tokens(model: Any, tokenizer: Any, text: str, *, opened: bool = False) -> list[int]:
    """A text's token ids as the model was trained on them: to go on from, or whole, with the tokenizer's special tokens."""
    goes_on = model.can_generate() and not model.config.is_encoder_decoder
    return prompt_tokens(tokenizer, text, opened=opened) if goes_on else tokenizer(text, verbose=False).input_ids


def _filled(values: list[int], filling: int, length: int, side: str) -> list[int]:
    missing = [filling] * (length - len(values))
    return missing + values if side == "left" else values + missing
