"""The learning rate a run gets if it names none, and when a given one looks like LoRA's.

Under Adam every element of the trainable tensor moves by about the learning rate a step, and so does each of its copies in
W. What the layer computes moves by the sum of those: for bone by lr * sum_j |s_j|, and with s the sum of in/r shards that
is about lr * sqrt(in * r): twice the shard size asks for 1/sqrt(2) of the rate. See docs/guide.md for the measurements.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch

from bonetune.errors import InputError
from bonetune.spec import ShardSpec

# At r = 64, the best or near the best of the rates tried in short runs on SmolLM2-135M (docs/guide.md has the figures).
_AT_64 = {"bone": 4e-4, "mini": 4e-4, "bat": 2e-4, "bat-row": 2e-4, "bat-free": 4e-4, "bat-left": 4e-4}
# What stands in the name of a parameter of a module that PEFT trains whole.
WHOLE_MODULE = ".modules_to_save."
# Above this multiple of the default, runs of bone and bat learned markedly less.
_TOO_LARGE = 2.0


def default_learning_rate(spec: ShardSpec) -> float:
    """Peak learning rate for AdamW on adapters of this variant and r: one significant digit of rate(64) * sqrt(64 / r)."""
    return float(f"{_AT_64[spec.variant] * math.sqrt(64 / spec.r):.0e}")


def lora_sized(rate: float, spec: ShardSpec) -> bool:
    """Whether `rate` is so far above the default that it was probably chosen for LoRA (1e-4 to 2e-3 there)."""
    return rate > _TOO_LARGE * default_learning_rate(spec)


def schedule_settings(name: str, given: dict[str, Any], steps: int, warmup: float) -> dict[str, Any]:
    """What transformers' schedule takes besides, for a run of `steps`.

    The decay of warmup_stable_decay, num_decay_steps, may be a share of the run, up to 1, and is a tenth of it where nothing is
    said: the rate rises in warmup_steps, stays, and falls then.

    Raises:
        InputError: a decay that is no number above 0, or is longer than what the warm-up leaves.
    """
    if name != "warmup_stable_decay":
        return given
    decay: Any = given.get("num_decay_steps", 0.1)
    if isinstance(decay, bool) or not isinstance(decay, int | float) or not decay > 0:
        raise InputError(f"lr_scheduler_kwargs.num_decay_steps should be steps, or a share of all, above 0: got {decay!r}.")
    if "num_stable_steps" in given:
        raise InputError("lr_scheduler_kwargs.num_stable_steps is what warmup_steps and num_decay_steps leave: leave it out.")
    whole = math.ceil(decay * steps) if isinstance(decay, float) and decay <= 1 else int(decay)
    rising = math.ceil(warmup * steps) if warmup < 1 else int(warmup)
    if rising + whole > steps:
        raise InputError(
            f"A warm-up of {rising} steps and a decay of {whole} do not fit into {steps}: lower warmup_steps, or "
            "lr_scheduler_kwargs.num_decay_steps."
        )
    return given | {"num_decay_steps": whole}


def give_rate(optimizer: torch.optim.Optimizer, parameters: Iterable[torch.nn.Parameter], rate: float) -> None:
    """Have an optimizer that has made no step move some of its parameters at a rate of their own.

    Each of its groups gives those away to one behind it, alike in all else; schedules multiply each group's own rate.
    """
    given = {id(p) for p in parameters}
    for group in list(optimizer.param_groups):
        mine = [p for p in group["params"] if id(p) in given]
        group["params"] = [p for p in group["params"] if id(p) not in given]
        if mine:
            optimizer.add_param_group({**group, "params": mine, "lr": rate})
