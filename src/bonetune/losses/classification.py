"""The training loss of a classifier."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bonetune.data.examples import IGNORED


def classification_loss(model: Any, *, labels: Tensor, supervised: Tensor | int | None = None, **inputs: Any) -> Tensor:
    """Sum of `label_loss` over the batch, divided by `supervised`.

    Args:
        model: a model with a head for classification: logits (batch, classes), or (batch, 1) for regression.
        labels: (batch,): classes, int64, or numbers, float32; those without a label (see `is_labelled`) are left out.
        supervised: what to divide by, the number of examples of all batches that make one optimizer step; None: of this batch.
        inputs: what the model's forward takes.
    """
    total = label_loss(model(**inputs).logits, labels)
    return total / (is_labelled(labels).sum().clamp(min=1) if supervised is None else supervised)


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of -log softmax(logits)[label], float32; with one logit, of (logit - label)^2. Shapes as in `classification_loss`."""
    if logits.shape[-1] > 1:
        return functional.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
    difference = logits[:, 0].float() - labels.float()
    return torch.where(is_labelled(labels), difference, 0.0).square().sum()


def is_labelled(labels: Tensor) -> Tensor:
    """Which labels are ones: classes but `IGNORED`, numbers but NaN. Shape of `labels`, bool."""
    return ~labels.isnan() if labels.is_floating_point() else labels != IGNORED
