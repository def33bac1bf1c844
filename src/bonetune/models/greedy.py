"""Greedy decoding and nothing else, whatever a model's own generation settings are."""

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


@torch.inference_mode()
def greedy(model: Any, tokenizer: Any, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int) -> Tensor:
    """The most probable continuation, token by token: (batch, length) to (batch, length + new), padded after its end.

    Penalties, beams, sampling and whatever else the model's generation_config asks for are left aside.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    settings = GenerationConfig(do_sample=False, eos_token_id=end_tokens(model, tokenizer), pad_token_id=pad)
    with _generation_config(model, settings):
        return model.generate(input_ids=input_ids, attention_mask=attention_mask, max_new_tokens=max_new_tokens)


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
