"""Batched greedy generation."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from bonetune.data import prompt_tokens
from bonetune.models import greedy


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    on_batch: Callable[[int], None] | None = None,
) -> list[str]:
    """The model's greedy continuation of each prompt, without special tokens, in the order of the prompts.

    Args:
        model: a causal language model; it is put into evaluation mode and back.
        tokenizer: its tokenizer.
        prompts: texts.
        max_new_tokens: where a continuation ends at the latest.
        batch_size: prompts at a time; prompts of like length go together.
        on_batch: called with the number of prompts done since the last call.

    Raises:
        InputError: an empty prompt, with a tokenizer that opens texts with nothing.
    """
    ids = [prompt_tokens(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    answers = [""] * len(ids)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            longest = max(len(ids[i]) for i in batch)
            rows = torch.tensor([[pad] * (longest - len(ids[i])) + ids[i] for i in batch], device=model.device)
            mask = torch.tensor([[0] * (longest - len(ids[i])) + [1] * len(ids[i]) for i in batch], device=model.device)
            out = greedy(model, tokenizer, rows, mask, max_new_tokens)
            for i, row in zip(batch, out, strict=True):
                answers[i] = tokenizer.decode(row[longest:], skip_special_tokens=True)
            if on_batch is not None:
                on_batch(len(batch))
    finally:
        model.train(was_training)
    return answers
