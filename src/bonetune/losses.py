"""The training loss, with logits computed only where a label needs them."""

import inspect
from typing import Any

import torch
from torch import Tensor

from bonetune.data.encoding import IGNORED


def completion_loss(
    model: Any, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, supervised: Tensor | int | None = None
) -> Tensor:
    """sum over supervised tokens of -log p(token | what precedes it), divided by `supervised`.

    Args:
        model: a Hugging Face causal language model (adapted or not).
        input_ids, attention_mask, labels: (batch, length), int64; labels are `IGNORED` where not supervised.
        supervised: what to divide by, the number of supervised tokens of all batches that make one optimizer step; None
            divides by this batch's own.

    The vocabulary's logits are computed for the columns in which some example has a label, in the model's dtype; the
    cross-entropy in float32.
    """
    targets = labels[:, 1:]
    columns = (targets != IGNORED).any(0).nonzero().squeeze(-1)
    options = {"logits_to_keep": columns} if _keeps_some_logits(model) else {}
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **options).logits
    if not options:
        logits = logits[:, columns]
    targets = targets[:, columns]
    wanted = targets != IGNORED
    total = torch.nn.functional.cross_entropy(logits[wanted].float(), targets[wanted], reduction="sum")
    return total / (wanted.sum() if supervised is None else supervised)


def _keeps_some_logits(model: Any) -> bool:
    """Whether the model's forward can be told for which positions logits are wanted."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters
