"""A whole training step: forward, loss, backward and the optimizer's step, over that of the frozen model."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.results import Result, markdown
from benchmarks.timing import interleaved, ratio
from benchmarks.whole import STEP_METHODS, batch, prepared, where
from bonetune.losses import completion_loss


def run(rounds: int, quick: bool) -> Result:
    """One step of each method a round, after one that does not count."""
    inputs = batch(quick)
    models = dict(prepared(STEP_METHODS, quick))
    trainable = {name: sum(p.numel() for p in model.parameters() if p.requires_grad) for name, model in models.items()}
    seconds = interleaved({name: _step(model, inputs) for name, model in models.items()}, rounds, shortest=0)
    rows, lines = [], []
    for name, mine in seconds.items():
        over = ratio(mine, seconds["frozen"])
        rows.append({"method": name, "over": "frozen", "parameters": trainable[name], **vars(over), "seconds": mine})
        lines.append([name, f"{trainable[name]:,}", str(over)])
    caption = (
        f"One training step of {where(quick)}: forward, `completion_loss`, backward, AdamW; "
        "CPU time over the frozen model's, which has no optimizer; median [lowest, highest]."
    )
    return Result(rows, f"{caption}\n\n{markdown(['method', 'parameters', 'step'], lines)}")


def _step(model: Any, inputs: dict[str, Any]) -> Callable[[], None]:
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-5) if trainable else None

    def step() -> None:
        completion_loss(model, **inputs).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step
