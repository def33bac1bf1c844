"""Decoding as it is asked for and nothing else, whatever a model's own generation settings are."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The token ids at which an answer ends: the tokenizer's, which training teaches, and the model's own."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return sorted({token for token in (tokenizer.eos_token_id, *own) if token is not None})


def greedy(
    model: Any, tokenizer: Any, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, **watching: Any
) -> Tensor:
    """The most probable continuation, token by token: (batch, length) to (batch, length + new), padded after its end."""
    return decode(model, tokenizer, input_ids, attention_mask, max_new_tokens, **watching)


@torch.inference_mode()
def decode(
    model: Any,
    tokenizer: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    **watching: Any,
) -> Tensor:
    """A continuation, token by token: (batch, length) to (batch, length + new), padded after its end.

    An encoder-decoder's does not hold the prompt: (batch, 1 + new), from the token on with which its decoder begins.
    Penalties, beams, cut-offs and whatever else the model's generation_config asks for are left aside.

    Args:
        temperature: 0 takes the most probable token; else tokens are drawn from softmax(logits / temperature).
        watching: transformers' `streamer`, `stopping_criteria` and `logits_processor`.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
    start = getattr(model.config, "decoder_start_token_id", None)
    ends = end_tokens(model, tokenizer)
    settings = GenerationConfig(eos_token_id=ends, pad_token_id=pad, decoder_start_token_id=start, **drawn)
    with _generation_config(model, settings):
        return model.generate(input_ids=input_ids, attention_mask=attention_mask, max_new_tokens=max_new_tokens, **watching)


@contextmanager
def _generation_config(model: Any, settings: GenerationConfig) -> Iterator[None]:
    # generate() fills what a passed configuration leaves open from the model's own, hence the exchange
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = base.generation_config
    base.generation_config = settings
    try:
        yield
    finally:
        base.generation_config = own
