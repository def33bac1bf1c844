"""`python -m benchmarks.gpu`: are the Triton kernels right on this GPU, and how fast?

Every variant, r and dtype is held against the equations in float64. Then one Linear's forward + backward is timed, ours by
the kernels and by PyTorch beside PEFT's methods, over the frozen layer, which is the library's two products. Prints
Markdown; --json writes everything. With TRITON_INTERPRET=1 and no GPU the same is gone through at tiny sizes, by Triton's
interpreter: that shows that this program works, and its times mean nothing.
"""

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import machine
from benchmarks.interpreter import bfloat16_products
from benchmarks.layers import forward_backward, short
from benchmarks.methods import adapt, lora_rank, named
from benchmarks.results import markdown
from benchmarks.timing import Sample, Step, interleaved, ratio
from bonetune import VARIANTS, ShardSpec, set_backend
from bonetune.ops import PlainWeight, Update, adapted_linear, apply
from bonetune.ops.backend import DTYPES, SIZES

# Relative errors of a tensor that pass. What PyTorch's path has beside them is printed, too.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
PEFT = ("lora", "miss (PEFT)", "bat (PEFT)")


@dataclass(frozen=True)
class Place:
    """Where and how large.

    Args:
        device: cuda, or cpu for the interpreter.
        checked: (out, in, rows) in units of r, r and 1, for the checks.
        timed: (out, in, rows) of the layers that are timed.
        sample: measures.
        shortest: seconds of a sample at least.
    """

    device: str
    checked: tuple[tuple[int, int, int], ...]
    timed: tuple[tuple[int, int, int], ...]
    sample: Sample
    shortest: float


@dataclass(frozen=True)
class Checked:
    """One tensor of one case: relative errors against float64 of the kernels and of PyTorch's path."""

    variant: str
    r: int
    dtype: str
    shape: tuple[int, int, int]
    tensor: str
    triton: float
    torch: float
    passed: bool


def place() -> Place:
    """The GPU, or the interpreter. Raises SystemExit with what to do if there is neither."""
    if torch.cuda.is_available():
        checked = ((8, 24, 17), (8, 24, 64), (24, 8, 333), (16, 16, 4096))
        timed = ((2048, 2048, 1024), (4096, 4096, 4096), (11008, 4096, 4096), (4096, 4096, 16384))
        return Place("cuda", checked, timed, gpu_seconds, 0.02)
    if os.environ.get("TRITON_INTERPRET") == "1":
        return Place("cpu", ((2, 3, 17), (3, 2, 70)), ((128, 128, 32),), _wall_seconds, 0.0)
    sys.exit("No GPU is here. TRITON_INTERPRET=1 python -m benchmarks.gpu goes through the same by Triton's interpreter.")


def gpu_seconds(step: Step, calls: int) -> float:
    """Seconds between two events around so many calls."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(calls):
        step()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1000


def _wall_seconds(step: Step, calls: int) -> float:
    began = time.perf_counter()
    for _ in range(calls):
        step()
    return time.perf_counter() - began


def check(where: Place, sizes: list[int]) -> Iterator[Checked]:
    """Each variant, r, dtype and shape: y and each gradient."""
    for variant in VARIANTS:
        for r in sizes:
            for dtype in DTYPES:
                for out, features, rows in where.checked:
                    yield from _case(where, ShardSpec(variant, r, r), dtype, (out * r, features * r, rows))


def _case(where: Place, spec: ShardSpec, dtype: torch.dtype, shape: tuple[int, int, int]) -> Iterator[Checked]:
    out, features, rows = shape
    drawn = torch.Generator().manual_seed(0)
    randn = lambda *size: torch.randn(*size, generator=drawn)  # noqa: E731
    W, x = (randn(out, features) / features**0.5).to(where.device, dtype), randn(rows, features).to(where.device, dtype)
    theta, dy = (randn(*spec.shape(out, features)) / spec.r**0.5).to(where.device), randn(rows, out).to(where.device, dtype)

    def run(function: Callable[[Tensor, Tensor], Tensor], wide: bool) -> dict[str, Tensor]:
        x_, theta_ = (t.detach().to(torch.float64 if wide else t.dtype).requires_grad_() for t in (x, theta))
        y = function(x_, theta_)
        dx, dtheta = torch.autograd.grad(y, [x_, theta_], dy.to(y.dtype))
        return {"y": y.detach(), "dx": dx, "dtheta": dtheta}

    def by(backend: Any) -> dict[str, Tensor]:
        return run(lambda x_, t: adapted_linear(PlainWeight(W), x_, [Update(t, spec)], backend), False)

    expected = run(lambda x_, t: apply(x_, W.double(), [Update(t, spec)]), True)
    ours, plain = by("triton"), by("torch")
    for name, want in expected.items():
        error, other = (((got[name].double() - want).norm() / want.norm()).item() for got in (ours, plain))
        yield Checked(spec.variant, spec.r, short(dtype), shape, name, error, other, error < TOLERANCE[dtype])


def timed(where: Place, rounds: int) -> list[dict[str, Any]]:
    """Forward + backward of one Linear in bfloat16, over the frozen layer's."""
    rows = []
    for out, features, tokens in where.timed:
        print(f"layer {out} x {features}, {tokens} tokens", file=sys.stderr)
        torch.manual_seed(0)
        x, dy = (torch.randn(tokens, side, device=where.device, dtype=torch.bfloat16) for side in (features, out))
        steps = {}
        for name, method in named(("frozen", *PEFT, *VARIANTS)).items():
            for backend in ("triton", "torch") if name in VARIANTS else ("",):
                layer = nn.Sequential(nn.Linear(features, out, bias=False)).to(where.device, torch.bfloat16)
                model = adapt(layer, method)
                if backend:
                    set_backend(model, backend)
                steps[f"{name} {backend}".strip()] = forward_backward(model, x, dy)
        seconds = interleaved(steps, rounds, where.shortest, where.sample)
        about = {"out": out, "in": features, "tokens": tokens, "lora_rank": lora_rank([(out, features)])}
        for name, mine in seconds.items():
            rows.append(about | {"method": name, **asdict(ratio(mine, seconds["frozen"])), "seconds": mine})
    return rows


def _checks_table(checks: list[Checked]) -> str:
    """The worst error of each variant and dtype."""
    lines = []
    for variant in VARIANTS:
        for dtype in map(short, DTYPES):
            mine = [c for c in checks if (c.variant, c.dtype) == (variant, dtype)]
            worst = max(mine, key=lambda c: c.triton)
            verdict = "passed" if all(c.passed for c in mine) else "FAILED"
            lines.append([variant, dtype, f"{worst.triton:.1e}", f"{worst.torch:.1e}", f"{worst.tensor}, r={worst.r}", verdict])
    return markdown(["variant", "dtype", "worst error", "PyTorch's there", "where", ""], lines)


def _times_table(rows: list[dict[str, Any]]) -> str:
    layers = list(dict.fromkeys((row["out"], row["in"], row["tokens"]) for row in rows))
    lines = []
    for name in dict.fromkeys(row["method"] for row in rows):
        mine = {(row["out"], row["in"], row["tokens"]): row for row in rows if row["method"] == name}
        cells = (mine[layer] for layer in layers)
        lines.append([name, *(f"{row['median']:.2f} [{row['lowest']:.2f}, {row['highest']:.2f}]" for row in cells)])
    return markdown(["method", *(f"{out} x {features}, {tokens}" for out, features, tokens in layers)], lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--r", type=int, nargs="*", default=list(SIZES), choices=SIZES, help="check these r")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds, of which medians are taken")
    parser.add_argument("--json", type=Path, help="also write everything here")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # PEFT and transformers speak of files and settings that do not matter here
    where = place()
    with bfloat16_products() if where.device == "cpu" else nullcontext():
        _report(where, arguments)


def _report(where: Place, arguments: argparse.Namespace) -> None:
    facts = machine.record()
    device = (
        torch.cuda.get_device_name() if where.device == "cuda" else "no GPU: Triton's interpreter, whose times mean nothing"
    )
    print(f"{device}. {machine.line(facts)} {arguments.rounds} rounds.\n", flush=True)
    checks = list(check(where, arguments.r))
    print("Relative error against the equations in float64: the worst of y, dx and the adapter's gradient.\n")
    print(_checks_table(checks), flush=True)
    rows = timed(where, arguments.rounds)
    print("\nOne Linear (out x in, tokens), bfloat16, r = 64, forward + backward, over the frozen layer: median [range].\n")
    print(_times_table(rows))
    if arguments.json:
        content = {"environment": facts, "device": device, "checks": [asdict(c) for c in checks], "times": rows}
        arguments.json.write_text(json.dumps(content, indent=2))
    if failed := [c for c in checks if not c.passed]:
        sys.exit(f"{len(failed)} of {len(checks)} checks failed, the worst {max(failed, key=lambda c: c.triton)}.")


if __name__ == "__main__":
    main()
