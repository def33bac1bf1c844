"""What a model is trained for: how its examples are batched, what the loss is, what is measured beside it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bonetune.data import Encoded, EncodedSet
from bonetune.data.batches import Batch, packed, padded
from bonetune.losses import classification_loss, completion_loss, is_labelled, label_loss, segmented_loss
from bonetune.metrics import agreement

# What travels with a batch and is no input of the model.
ABOUT = ("supervised", "tokens", "examples")


@dataclass(frozen=True)
class Task:
    """One of PEFT's task types, as far as training knows it.

    Args:
        name: PEFT's.
        loss: (model, batch's tensors, what to divide by) to the loss.
        supervised: examples to what each adds to that divisor.
        metrics: logits and labels of all evaluated examples to named numbers.
    """

    name: str
    loss: Callable[..., Tensor]
    supervised: Callable[[EncodedSet], np.ndarray]
    metrics: Callable[[Tensor, Tensor], dict[str, float]] | None = None

    def collator(self, pad_token_id: int, packing: bool) -> Callable[[Sequence[Encoded]], Batch]:
        """Examples to the model's inputs."""
        return packed if packing else padded(pad_token_id, pad_labels=self.metrics is None)

    @torch.no_grad()
    def evaluate(self, model: Any, batches: Iterable[Batch]) -> tuple[float, int, Tensor | None, Tensor | None]:
        """Sum of the loss over `batches`, what to divide it by, and the logits and labels where there are metrics of them."""
        total, count = 0.0, 0
        logits, labels = [], []
        for batch in batches:
            inputs = {name: value for name, value in batch.items() if name not in ABOUT}
            if self.metrics is None:
                total += self.loss(model, **inputs, supervised=1).item()
            else:
                wanted = inputs.pop("labels")
                answer = model(**inputs).logits
                total += label_loss(answer, wanted).item()
                some = is_labelled(wanted)
                logits.append(answer[some].float().cpu())
                labels.append(wanted[some].cpu())
            count += batch["supervised"]
        return total, count, torch.cat(logits) if logits else None, torch.cat(labels) if labels else None


def task_named(name: str, *, bptt_length: int | None = None, l2_wrap: float = 0.0) -> Task:
    """The task of a `task_type`; of a causal language model, with a loss by segments or a penalty on the largest logits."""
    task = _TASKS[name]
    penalty = {"penalty": l2_wrap} if l2_wrap else {}
    if bptt_length is not None:
        return replace(task, loss=partial(segmented_loss, bptt_length=bptt_length, **penalty))
    return replace(task, loss=partial(task.loss, **penalty)) if penalty else task


_TASKS = {
    "CAUSAL_LM": Task("CAUSAL_LM", completion_loss, lambda examples: examples.supervised),
    "SEQ_2_SEQ_LM": Task("SEQ_2_SEQ_LM", completion_loss, lambda examples: examples.labelled),
    "SEQ_CLS": Task("SEQ_CLS", classification_loss, lambda examples: np.ones(len(examples), np.int64), agreement),
}
