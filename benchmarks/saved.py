"""What a training step keeps for backward: bytes by storage, and of the whole model beside the frozen one."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from benchmarks.results import Result, markdown
from benchmarks.whole import STEP_METHODS, batch, prepared, where
from bonetune.losses import completion_loss


def saved_mib(forward: Callable[[], Tensor], left_out: Iterable[Tensor]) -> float:
    """MiB of the storages that `forward` keeps for backward, without those of the tensors `left_out`."""
    given = {tensor.untyped_storage().data_ptr() for tensor in left_out}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held = forward()
    del held
    return sum(kept.values()) / 2**20


def run(rounds: int, quick: bool) -> Result:
    """Of one forward of the whole model with its loss. Nothing varies, so nothing is repeated."""
    inputs = batch(quick)
    rows: list[dict[str, Any]] = []
    for name, model in prepared(STEP_METHODS, quick):
        kept = saved_mib(lambda model=model: completion_loss(model, **inputs), model.parameters())
        rows.append({"method": name, "saved_mib": kept, "over_frozen_mib": kept - rows[0]["saved_mib"] if rows else 0.0})
    lines = [[row["method"], f"{row['saved_mib']:.0f}", f"{row['over_frozen_mib']:.0f}"] for row in rows]
    caption = f"Kept for backward by one step of {where(quick)}, MiB; parameters left out."
    return Result(rows, f"{caption}\n\n{markdown(['method', 'saved', 'more than frozen'], lines)}")
