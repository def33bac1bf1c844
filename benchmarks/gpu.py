"""`python -m benchmarks.gpu`: are the Triton kernels right on this GPU, and how fast?

Every variant, r and dtype is held against the equations in float64, row by row, twice for the same bits, and in a batch whose
rows have adapters of their own. Then one Linear's forward + backward is timed, ours by the kernels and by PyTorch beside PEFT's
methods, over the frozen layer, which is the library's two products; and each kernel alone. Times are the GPU's, between events,
with the second-level cache emptied before. Prints Markdown; --json writes everything, also what there is when something fails.
With TRITON_INTERPRET=1 and no GPU the same is gone through at tiny sizes, by Triton's interpreter: that shows that this program
works, and its times mean nothing.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import machine
from benchmarks.interpreter import bfloat16_products
from benchmarks.kernels import cases
from benchmarks.layers import forward_backward, short
from benchmarks.methods import adapt, lora_rank, named
from benchmarks.results import markdown
from benchmarks.timing import Sample, Step, interleaved, ratio
from bonetune import VARIANTS, ShardSpec, set_backend
from bonetune.ops import PlainWeight, Rows, Update, adapted_linear, apply
from bonetune.ops.backend import DTYPES, INSTALLED, OLDEST, SIZES

# Relative errors of a row that pass. What PyTorch's path has beside them is printed, too.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
PEFT = ("lora", "lora bf16", "miss (PEFT)", "miss (PEFT) bf16", "bat (PEFT)", "bat (PEFT) bf16")
BY_ROW = ("bone", "mini", "bat-row", "bat-free", "bat-left")  # variants of which a mixed batch has a kernel
FLUSHED = 1 << 29  # bytes that are read before a call is timed: more than any second-level cache
CYCLES = 2e9  # of a GPU, a second


@dataclass(frozen=True)
class Place:
    """Where and how large.

    Args:
        device: cuda, or cpu for the interpreter.
        checked: (out, in, rows) in units of r, r and 1, for the checks.
        timed: (out, in, rows) of the layers that are timed.
        alone: r of which each kernel is timed alone; none: nothing is.
        sample: measures.
        shortest: seconds of a sample at least.
    """

    device: str
    checked: tuple[tuple[int, int, int], ...]
    timed: tuple[tuple[int, int, int], ...]
    alone: tuple[int, ...]
    sample: Sample
    shortest: float


@dataclass(frozen=True)
class Checked:
    """One tensor of one case: the worst row's relative error against float64, of the kernels and of PyTorch's path.

    Args:
        what: "layer", or "mixed batch", whose rows have adapters of their own.
        repeated: whether a second run gave the same bits.
        failure: the error, where one ended the case.
    """

    what: str
    variant: str
    r: int
    dtype: str
    shape: tuple[int, int, int]
    tensor: str
    triton: float = float("nan")
    torch: float = float("nan")
    repeated: bool = False
    passed: bool = False
    failure: str = ""


def place() -> Place:
    """The GPU, or the interpreter. Raises SystemExit with what to do if there is neither."""
    if torch.cuda.is_available():
        if not INSTALLED:
            sys.exit("Triton is not installed: pip install 'bonetune[triton]'.")
        device = f"cuda:{torch.cuda.device_count() - 1}"  # of several the last, which is not the current one
        if torch.version.hip is not None or torch.cuda.get_device_capability(device) < OLDEST:
            sys.exit(f"The kernels want an NVIDIA GPU of compute capability {OLDEST[0]}.{OLDEST[1]} or newer.")
        checked = ((8, 24, 1), (8, 24, 17), (8, 24, 64), (24, 8, 333), (16, 16, 4096))
        timed = ((4096, 4096, 64), (2048, 2048, 1024), (4096, 4096, 4096), (11008, 4096, 4096), (4096, 4096, 16384))
        return Place(device, checked, timed, (16, 64, 128), gpu_seconds, 0.02)
    if os.environ.get("TRITON_INTERPRET") == "1":
        return Place("cpu", ((2, 3, 17), (3, 2, 70)), ((128, 128, 32),), (), _wall_seconds, 0.0)
    sys.exit("No GPU is here. TRITON_INTERPRET=1 python -m benchmarks.gpu goes through the same by Triton's interpreter.")


def gpu_seconds(step: Step, calls: int) -> float:
    """Seconds that the GPU takes for so many calls, each between events of its own and from an empty second-level cache.

    The GPU is kept waiting until the host has issued the whole call, however long that takes: the host's time is not in this.
    """
    cache = torch.ones(FLUSHED // 4, device="cuda")
    torch.cuda.synchronize()
    began_at = time.perf_counter()
    step()
    wait = 2 * (time.perf_counter() - began_at)
    torch.cuda.synchronize()
    while True:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        late = 0
        for began, ended in events:
            cache.sum()  # read, so that nothing is left to be written back
            torch.cuda._sleep(int(wait * CYCLES))
            began.record()
            step()
            late += began.query()  # the GPU began before the host was through
            ended.record()
        torch.cuda.synchronize()
        if not late:
            return sum(began.elapsed_time(ended) for began, ended in events) / 1000
        wait *= 2


def _wall_seconds(step: Step, calls: int) -> float:
    began = time.perf_counter()
    for _ in range(calls):
        step()
    return time.perf_counter() - began


def check(where: Place, sizes: list[int]) -> Iterator[Checked]:
    """Each variant, r, dtype and shape: y and each gradient, and y of a mixed batch."""
    for variant in VARIANTS:
        for r in sizes:
            for dtype in DTYPES:
                for out, features, rows in where.checked:
                    case = Case(where.device, ShardSpec(variant, r, r), dtype, (out * r, features * r, rows))
                    yield from case.checked("layer", case.layer)
                    if variant in BY_ROW:
                        yield from case.checked("mixed batch", case.mixed_batch)


class Case:
    """Tensors of one check."""

    def __init__(self, device: str, spec: ShardSpec, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
        out, features, rows = shape
        drawn = torch.Generator().manual_seed(0)
        randn = lambda *size: torch.randn(*size, generator=drawn).to(device)  # noqa: E731
        self.W, self.x = (randn(out, features) / features**0.5).to(dtype), randn(rows, features).to(dtype)
        self.thetas = [randn(*spec.shape(out, features)) / spec.r**0.5 for _ in range(3)]
        self.dy = randn(rows, out).to(dtype)
        self.spec, self.dtype, self.shape = spec, dtype, shape

    def checked(self, what: str, run: Callable[[Any], dict[str, Tensor]]) -> Iterator[Checked]:
        """`run` by the kernels, twice, by PyTorch's path, and by the equations."""
        about = (what, self.spec.variant, self.spec.r, short(self.dtype), self.shape)
        found = []
        try:
            expected, plain, ours, again = (run(by) for by in ("equations", "torch", "triton", "triton"))
            for name, want in expected.items():
                error, other = (_worst_row(got[name], want) for got in (ours, plain))
                repeated = torch.equal(ours[name], again[name])
                found.append(Checked(*about, name, error, other, repeated, repeated and error < TOLERANCE[self.dtype]))
        except Exception as error:  # a report of what else holds is worth more
            found = [Checked(*about, "", failure=f"{type(error).__name__}: {error}")]
        yield from found

    def layer(self, by: Any) -> dict[str, Tensor]:
        """Y, dx and the adapter's gradient of one adapter on all rows."""
        wide = by == "equations"
        x, theta = (t.detach().to(torch.float64 if wide else t.dtype).requires_grad_() for t in (self.x, self.thetas[0]))
        updates = [Update(theta, self.spec)]
        y = apply(x, self.W.double(), updates) if wide else adapted_linear(PlainWeight(self.W), x, updates, by)
        dx, dtheta = torch.autograd.grad(y, [x, theta], self.dy.to(y.dtype))
        return {"y": y.detach(), "dx": dx, "dtheta": dtheta}

    @torch.no_grad()
    def mixed_batch(self, by: Any) -> dict[str, Tensor]:
        """Y of a batch with three adapters by turns, and rows without one: of a token each, or of as many as make few rows."""
        tokens = max(k for k in (1, 64, 111) if len(self.x) % k == 0)
        wide, x = by == "equations", self.x.view(-1, tokens, self.x.shape[1])
        updates = [
            Update(t.double() if wide else t, self.spec, rows=Rows(range(k, len(x), 4))) for k, t in enumerate(self.thetas)
        ]
        updates = [u for u in updates if u.rows is not None and u.rows.numbers]
        y = apply(x.double(), self.W.double(), updates) if wide else adapted_linear(PlainWeight(self.W), x, updates, by)
        return {"y": y}


def _worst_row(got: Tensor, want: Tensor) -> float:
    """The largest relative error of a row, or of a row of an adapter's tensor; rows smaller than usual count as usual ones."""
    got, want = (t.double().reshape(-1, t.shape[-1]) for t in (got, want))
    sizes = want.norm(dim=1)
    return ((got - want).norm(dim=1) / sizes.clamp_min(sizes.median())).max().item()


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
                step, called = forward_backward(model, x, dy), f"{name} {backend}".strip()
                if (failure := _failure(step)) and name != "frozen":
                    print(f"{called}: {failure}", file=sys.stderr)
                    continue
                steps[called] = step
        with torch.cuda.device(where.device) if where.device != "cpu" else nullcontext():
            seconds = interleaved(steps, rounds, where.shortest, where.sample)
        about = {"out": out, "in": features, "tokens": tokens, "lora_rank": lora_rank([(out, features)])}
        for name, mine in seconds.items():
            rows.append(about | {"method": name, **asdict(ratio(mine, seconds["frozen"])), "seconds": mine})
    return rows


def _failure(step: Step) -> str:
    """What goes wrong in a call, if something does: out of memory, say, or of registers."""
    try:
        step()
    except Exception as error:  # what else can be timed is worth more
        return f"{type(error).__name__}: {error}"
    return ""


def timed_alone(where: Place, rounds: int) -> list[dict[str, Any]]:
    """Each kernel in bfloat16, at the sizes of `benchmarks.kernels`, whose model says what it might take."""
    rows = []
    for r in where.alone:
        with torch.cuda.device(where.device):
            steps = {name: call for name, call in cases(torch.bfloat16, r, where.device).items() if not _failure(call)}
            seconds = interleaved(steps, rounds, where.shortest, where.sample)
        rows += [{"kernel": name, "r": r, "seconds": found} for name, found in seconds.items()]
    return rows


def _checks_table(checks: list[Checked]) -> str:
    """The worst error of each variant and dtype."""
    lines = []
    for variant in VARIANTS:
        for dtype in map(short, DTYPES):
            mine = [c for c in checks if (c.variant, c.dtype) == (variant, dtype)]
            verdict = "passed" if all(c.passed for c in mine) else "FAILED"
            if compared := [c for c in mine if not c.failure]:
                worst = max(compared, key=lambda c: (not c.passed, math.isnan(c.triton), c.triton))
                where = f"{worst.tensor}, {worst.what}, r={worst.r}"
                lines.append([variant, dtype, f"{worst.triton:.1e}", f"{worst.torch:.1e}", where, verdict])
            lines += [
                [variant, dtype, "", "", f"{c.what}, r={c.r}, {c.shape}: {c.failure[:200]}", "FAILED"]
                for c in mine
                if c.failure
            ]
    return markdown(["variant", "dtype", "worst error", "PyTorch's there", "where", ""], lines)


def _times_table(rows: list[dict[str, Any]]) -> str:
    layers = list(dict.fromkeys((row["out"], row["in"], row["tokens"]) for row in rows))
    lines = []
    for name in dict.fromkeys(row["method"] for row in rows):
        mine = {(row["out"], row["in"], row["tokens"]): row for row in rows if row["method"] == name}
        cells = (mine.get(layer) for layer in layers)
        lines.append([name, *(f"{c['median']:.2f} [{c['lowest']:.2f}, {c['highest']:.2f}]" if c else "failed" for c in cells)])
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
    content: dict[str, Any] = {"environment": machine.record() | _gpu(where), "checks": [], "times": [], "kernels": []}

    def save() -> None:
        if arguments.json:
            arguments.json.write_text(json.dumps(content, indent=2))

    device = content["environment"]["device"]
    print(f"{device}. {machine.line(content['environment'])} {arguments.rounds} rounds.\n", flush=True)
    checks = []
    for one in check(where, arguments.r):
        checks.append(one)
        content["checks"].append(asdict(one))
        save()
    print("Relative error against the equations in float64: the worst row of y, dx and the adapter's gradient.\n")
    print(_checks_table(checks), flush=True)
    content["times"] = timed(where, arguments.rounds)
    save()
    print("\nOne Linear (out x in, tokens), bfloat16, r = 64, forward + backward, over the frozen layer: median [range].\n")
    print(_times_table(content["times"]), flush=True)
    content["kernels"] = timed_alone(where, arguments.rounds)
    save()
    if content["kernels"]:
        print("\nKernels alone, bfloat16, 4096 x 4096, 4096 tokens; µs: median [range].\n")
        lines = []
        for row in content["kernels"]:
            micros = sorted(1e6 * s for s in row["seconds"])
            lines.append([row["kernel"], str(row["r"]), f"{statistics.median(micros):.1f} [{micros[0]:.1f}, {micros[-1]:.1f}]"])
        print(markdown(["kernel", "r", "µs"], lines))
    if failed := [c for c in checks if not c.passed]:
        sys.exit(f"{len(failed)} of {len(checks)} checks failed, the first {failed[0]}.")


def _gpu(where: Place) -> dict[str, Any]:
    """What there is to know of the device besides."""
    if where.device == "cpu":
        return {"triton": version("triton"), "device": "no GPU: Triton's interpreter, whose times mean nothing"}
    about = torch.cuda.get_device_properties(where.device)
    facts = {
        "capability": [about.major, about.minor],
        "memory": about.total_memory,
        "multiprocessors": about.multi_processor_count,
    }
    return facts | {"triton": version("triton"), "cuda": torch.version.cuda, "device": about.name}


if __name__ == "__main__":
    main()
