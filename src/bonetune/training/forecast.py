"""How long a planned run will take, from one of its own batches."""

import time
from typing import Any

import numpy as np
import torch

from bonetune.training.plan import Plan
from bonetune.training.tasks import ABOUT


def expected_seconds(planned: Plan) -> float:
    """Seconds of the whole run: a forward and backward of a batch of middling size, timed on the model as it is loaded.

    What does not grow with the tokens (evaluations, checkpoints, the optimizer's own time) is not in it. The model's gradients
    are gone afterwards, its weights unchanged.
    """
    config, train = planned.config, planned.train
    middle = np.argsort(train.lengths, kind="stable")[len(train) // 2 :][: config.per_device_train_batch_size]
    batch = planned.batch([train[int(i)] for i in middle])
    model: Any = planned.model
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = {name: _on(device, value) for name, value in batch.items() if name not in ABOUT}
    was_training = model.training
    model.to(device).train()
    if config.gradient_checkpointing:
        planned.loaded.model.gradient_checkpointing_enable()
    with planned.attention(), torch.autocast(device.type, torch.bfloat16, config.bf16):
        _forward_and_backward(planned, inputs)  # the first one prepares what later ones find
        began = time.perf_counter()
        _forward_and_backward(planned, inputs)
        seconds = time.perf_counter() - began
    if config.gradient_checkpointing:
        planned.loaded.model.gradient_checkpointing_disable()
    model.zero_grad(set_to_none=True)
    model.train(was_training)
    tokens_of_a_step = planned.lengths.tokens / planned.lengths.examples * planned.batches.batch_size / planned.world
    return seconds / batch["tokens"] * tokens_of_a_step * planned.steps


def _forward_and_backward(planned: Plan, inputs: dict[str, Any]) -> None:
    planned.task.loss(planned.model, **inputs).backward()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _on(device: torch.device, value: Any) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
