"""One adapted Linear against the frozen one: forward + backward with respect to input and trainable parameters."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.floors import floor
from benchmarks.methods import METHODS, SAME_FUNCTION, Method, R, adapt, lora_rank
from benchmarks.results import Result, markdown
from benchmarks.saved import saved_mib
from benchmarks.timing import interleaved, ratio

# (out, in, tokens)
SHAPES = [(576, 576, 1024), (2048, 2048, 1024), (576, 1536, 4096), (2048, 2048, 4096)]


def run(rounds: int, quick: bool) -> Result:
    """All shapes (if quick, the smallest) with a bfloat16 and a float32 base."""
    rows: list[dict[str, Any]] = []
    texts: list[str] = []
    for dtype in (torch.bfloat16, torch.float32):
        measured = [measure(*shape, dtype, rounds) for shape in (SHAPES[:1] if quick else SHAPES)]
        rows += [row for of_shape in measured for row in of_shape]
        texts.append(_tables(measured, short(dtype)))
    return Result(rows, "\n\n".join(texts))


def measure(out: int, inp: int, tokens: int, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """For each method: CPU time over the frozen layer's, its floor, and what is kept for backward; then ours over PEFT's."""
    print(f"layer {out} x {inp}, {tokens} tokens, {short(dtype)}", file=sys.stderr)
    torch.manual_seed(0)
    x, dy = torch.randn(tokens, inp, dtype=dtype), torch.randn(tokens, out, dtype=dtype)
    models = {
        name: adapt(nn.Sequential(nn.Linear(inp, out, bias=False)).to(dtype), method)
        for name, method in _methods(dtype).items()
    }
    saved = {name: _saved(model, x) for name, model in models.items()}
    seconds = interleaved({name: forward_backward(model, x, dy) for name, model in models.items()}, rounds)
    about = {"out": out, "in": inp, "tokens": tokens, "dtype": short(dtype)}
    rows = []
    for name, mine in seconds.items():
        least = floor(METHODS[name].formula, out, inp, tokens, r=R, k=lora_rank([(out, inp)]))
        row = about | {"method": name, "over": "frozen", **vars(ratio(mine, seconds["frozen"])), "floor": least}
        rows.append(row | {"saved_mib": saved[name], "seconds": mine})
    for ours, theirs in SAME_FUNCTION:
        if ours in seconds:
            rows.append(about | {"method": ours, "over": theirs, **vars(ratio(seconds[ours], seconds[theirs]))})
    return rows


def _methods(dtype: torch.dtype) -> dict[str, Method]:
    """Over a float32 base there is no narrower adapter, and nothing that `exact` would keep from being rounded away."""
    wide = dtype == torch.float32
    return {name: method for name, method in METHODS.items() if not (wide and (method.narrow or name.endswith("exact")))}


def forward_backward(model: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    """What is timed: both passes, with respect to x and what is trained."""
    trainable = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        leaf = x.detach().requires_grad_()
        torch.autograd.grad(model(leaf), [leaf, *trainable], dy)

    return step


def _saved(model: nn.Module, x: Tensor) -> float:
    leaf = x.detach().requires_grad_()
    return saved_mib(lambda: model(leaf), [leaf, *model.parameters()])


def _tables(measured: list[list[dict[str, Any]]], dtype: str) -> str:
    """Methods down, shapes across."""
    columns = [f"{rows[0]['out']} x {rows[0]['in']}, {rows[0]['tokens']}" for rows in measured]

    def table(over_frozen: bool, cell: Callable[[dict[str, Any]], str]) -> str:
        by_method = zip(*([row for row in rows if (row["over"] == "frozen") == over_frozen] for rows in measured), strict=True)
        lines = [
            [row[0]["method"] if over_frozen else f"{row[0]['method']} over {row[0]['over']}", *map(cell, row)]
            for row in by_method
        ]
        return markdown(["method", *columns], lines)

    def time(row: dict[str, Any]) -> str:
        return f"{row['median']:.2f} [{row['lowest']:.2f}, {row['highest']:.2f}]"

    times = (
        f"One Linear (out x in, tokens), {dtype} base, forward + backward: CPU time over the frozen layer's, "
        "median [lowest, highest] / arithmetic floor."
    )
    over_peft = f"The same, {dtype} base, over PEFT's method of the same function in the same round."
    kept = f"Kept for backward, {dtype} base, MiB; the layer's input and parameters left out."
    return "\n\n".join(
        [
            *(times, table(True, lambda row: f"{time(row)} / {row['floor']:.2f}")),
            *(over_peft, table(False, time)),
            *(kept, table(True, lambda row: f"{row['saved_mib']:.2f}")),
        ]
    )


def short(dtype: torch.dtype) -> str:
    """Its name without torch."""
    return str(dtype).removeprefix("torch.")
