"""What the Triton kernels become for a GPU, without one: registers, spills and shared memory, and a model of their time.

`python -m benchmarks.kernels` compiles every default configuration for compute capability 8.0 and 9.0 (--capability 100 120:
for others) and prints what it takes; with --model, it prints the model instead, which needs no Triton. Nothing is run and
nothing is timed: that takes a GPU, and `python -m benchmarks.gpu`.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.results import markdown
from bonetune.ops.backend import SIZES

CAPABILITIES = (80, 90)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OUT, FEATURES, ROWS = 4096, 4096, 4096
FEW = (1, 64)  # rows of bat's products without W'
SHORT = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64"}
# Dense bfloat16 operations and bytes a second, by the makers' data sheets.
GPUS = {"A100 80GB SXM": (312e12, 2.039e12), "H100 SXM": (989e12, 3.35e12)}


@dataclass(frozen=True)
class Usage:
    """What ptxas says of one kernel: registers a thread, bytes of its stack (which spilled registers need), shared bytes."""

    kernel: str
    dtype: str
    r: int
    capability: int
    registers: int
    stack: int
    shared: int


def cases(dtype: torch.dtype, r: int, device: str = "meta") -> dict[str, Callable[[], object]]:
    """Each kernel as layers call it, and with everything that can be asked of it at once."""
    from bonetune.ops.column import FUSED, REDUCED
    from bonetune.ops.kernels import blocks, column, gathered, shards

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        made = torch.empty(*shape, dtype=dtype, device=device)
        return made if made.is_meta else made.normal_()

    x, s, W, dy, bias = empty(ROWS, FEATURES), empty(ROWS, r), empty(OUT, FEATURES), empty(ROWS, OUT), empty(OUT)
    M, B = empty(FEATURES // r, r, r, dtype=torch.float32), empty(OUT // r, r, r, dtype=torch.float32)
    D, one = empty(r, OUT, dtype=torch.float32), empty(1, r, r, dtype=torch.float32)
    found: dict[str, Callable[[], object]] = {
        "shard sum": lambda: shards.shard_sum(x, r),
        "shard add": lambda: shards.shard_add_(x, s),
        "block product, bat-left": lambda: blocks.block_product(dy, B, 0.5, s, dy, False),
        "block product, bat-left dy": lambda: blocks.block_product(dy, B.mT, 0.5, None, dy, True),
        "block backward, bat-left, apart": lambda: blocks.block_backward(dy, B, 0.5, dy, None, None, None, True),
        "block gradient, bat-left": lambda: blocks.block_backward(dy, B, 0.5, dy, s, None, None, False),
    }
    for name, theta in (("bat-row", M), ("bat-free", one)):
        found |= {
            f"block product, {name}": lambda m=theta: blocks.block_product(x, m.mT, 0.5, None, x, True),
            f"block product, {name}, apart": lambda m=theta: blocks.block_product(x, m.mT, 0.5, None, None, True),
            f"block product, {name}, by W": lambda m=theta: blocks.block_product(W, m, 0.5, None, W, False),
            f"block product, {name}, all": lambda m=theta: blocks.block_product(x, m, 0.5, s, x, True),
            f"block backward, {name}": lambda m=theta: blocks.block_backward(x, m.mT, 0.5, x, None, s, x, True),
            f"block backward, {name}, apart": lambda m=theta: blocks.block_backward(x, m.mT, 0.5, x, None, None, None, True),
            f"block backward, {name}, all": lambda m=theta: blocks.block_backward(x, m, 0.5, x, s, s, x, True),
            f"block gradient, {name}": lambda m=theta: blocks.block_backward(x, m.mT, 0.5, x, None, s, None, False),
        }
    found |= {
        "bat weight": lambda: column.weight(W, B, 0.5, W),
        "bat weight, apart": lambda: column.weight(W, B, 0.5, None),
    }
    if r in REDUCED[dtype.itemsize]:
        found["bat gradient"] = lambda: column.gradient(x, dy, W, r, 0.5)
    if r in FUSED[dtype.itemsize]:
        for n in (1, 32, 64):  # tiles of 16, 32 and 64 rows
            found |= {
                f"bat product, {n} rows": lambda n=n: column.product(x[:n], W, B, bias, 0.5, True),
                f"bat product, {n} rows, apart": lambda n=n: column.product(x[:n], W, B, None, 0.5, False),
                f"bat product backward, {n} rows": lambda n=n: column.product_backward(dy[:n], W, B, 0.5, True),
            }
    index, scales = [0, 1] * 4, [0.5, 1.0]
    for tokens in (1, 256):
        v, t = empty(8, tokens, FEATURES), empty(8, tokens, r)
        found |= {
            f"gathered product, {tokens} tokens": lambda t=t: gathered.product(t, [D, D], index, scales),
            f"gathered block product, bat-row, {tokens} tokens": lambda v=v: gathered.block_product(
                v, [M, M], index, scales, None, True
            ),
            f"gathered block product, bat-free, {tokens} tokens": lambda v=v: gathered.block_product(
                v, [one, one], index, scales, None, True
            ),
            f"gathered block product, bat-left, {tokens} tokens": lambda v=v, t=t: gathered.block_product(
                v, [M, M], index, scales, t, False
            ),
        }
    return found


def launches(call: Callable[[], object]) -> list[tuple[Any, dict[str, Any], dict[str, int]]]:
    """The kernels that a call launches: each with its arguments by name and the launch's options. None is run."""
    from triton.runtime.jit import JITFunction

    found: list[tuple[Any, dict[str, Any], dict[str, int]]] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
        found.append((kernel, dict(zip(kernel.arg_names, args, strict=False)) | kwargs, options))

    with mock.patch.object(JITFunction, "run", run):
        call()
    return found


def usages(capability: int, dtype: torch.dtype, r: int) -> Iterator[Usage]:
    """What each kernel takes. Needs Triton, and TRITON_INTERPRET unset."""
    for name, call in cases(dtype, r).items():
        for kernel, arguments, options in launches(call):
            cubin, shared = _compiled(kernel, arguments, options, capability)
            registers, stack = _resources(cubin)
            yield Usage(name, SHORT[dtype], r, capability, registers, stack, shared)


def _compiled(kernel: Any, arguments: dict[str, Any], options: dict[str, int], capability: int) -> tuple[bytes, int]:
    """The program, specialized on its arguments as a launch would be, and its shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {p.name for p in kernel.params if p.is_constexpr}
    as_they_come = {p.name for p in kernel.params if p.do_not_specialize}
    signature, fixed, aligned = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if name in as_they_come:
            signature[name] = "i32"
        elif name in constants or (isinstance(value, int) and value == 1):
            signature[name], fixed[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], aligned[(place,)] = f"*{SHORT[value.dtype]}", [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=fixed, attrs=aligned)
    done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return done.asm["cubin"], done.metadata.shared


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack, as Triton's own cuobjdump reads them from the program."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", told.stdout + told.stderr)
    assert found is not None, told
    return int(found[1]), int(found[2])


@dataclass(frozen=True)
class Work:
    """What a kernel does for one layer of bfloat16: bytes that memory must move at least, operations of tensor cores."""

    bytes: float
    operations: float

    def seconds(self, operations: float, bandwidth: float) -> float:
        """The longer of the two, as if they overlapped and nothing else cost anything."""
        return max(self.bytes / bandwidth, self.operations / operations)


def work(r: int) -> dict[str, Work]:
    """By kernel, for W (OUT, FEATURES), ROWS tokens, or FEW for bat's products without W'; adapters are float32."""
    x, y, W, shard = 2 * ROWS * FEATURES, 2 * ROWS * OUT, 2 * OUT * FEATURES, 2 * ROWS * r
    wide, tall = 4 * FEATURES * r, 4 * OUT * r  # the adapter's tensor of bat-row, and of bat, bat-left
    return {
        "shard sum of x": Work(x + shard, 0),
        "shard add to dx": Work(2 * x + shard, 0),
        "block product, x + z (bat-row)": Work(2 * x + wide + shard, 2 * ROWS * FEATURES * r),
        "block backward (bat-row)": Work(3 * x + 2 * wide + shard, 4 * ROWS * FEATURES * r),
        "block product, y (bat-left)": Work(2 * y + tall + shard, 2 * ROWS * OUT * r),
        "bat weight": Work(2 * W + tall, 2 * OUT * FEATURES * r),
        **{f"bat product, {n} rows": Work(W + tall + 2 * n * (FEATURES + OUT), 4 * n * OUT * FEATURES) for n in FEW},
        "bat gradient": Work(2 * (x + y) + W + tall, 2 * OUT * FEATURES * (ROWS + r) + 2 * ROWS * OUT * r),
    }


def model(r: int = 64) -> str:
    """A table: what bounds each kernel, and its share of the frozen layer's forward and backward on each GPU."""
    frozen = Work(4 * (ROWS * FEATURES + ROWS * OUT + OUT * FEATURES), 4 * ROWS * OUT * FEATURES)
    few = Work(2 * OUT * FEATURES, 2 * FEW[-1] * OUT * FEATURES)  # which its weight bounds, as it bounds a single row
    lines = []
    for name, one in work(r).items():
        cells = [name, f"{one.bytes / 2**20:.0f}", f"{one.operations / 1e9:.1f}"]
        for gpu in GPUS.values():
            bound = "memory" if one.bytes / gpu[1] > one.operations / gpu[0] else "arithmetic"
            against = few if "rows" in name else frozen
            cells += [bound, f"{one.seconds(*gpu) * 1e6:.0f}", f"{one.seconds(*gpu) / against.seconds(*gpu):.3f}"]
        lines.append(cells)
    header = ["kernel", "MiB", "10^9 operations"]
    for name in GPUS:
        header += [f"{name}: bound by", "µs", "over frozen"]
    return markdown(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="What the Triton kernels become for a GPU, without one.")
    parser.add_argument("--r", type=int, nargs="*", default=list(SIZES))
    parser.add_argument("--dtype", choices=[SHORT[d] for d in DTYPES], nargs="*", default=[SHORT[d] for d in DTYPES])
    parser.add_argument("--capability", type=int, nargs="*", default=list(CAPABILITIES), help="80 for 8.0, 90 for 9.0")
    parser.add_argument("--model", action="store_true", help="print the model of their time instead")
    chosen = parser.parse_args()
    if chosen.model:
        print(model())
        return
    spilled = 0
    print("| kernel | dtype | r | compute capability | registers | stack | shared memory, bytes |")
    print("| --- | --- | --: | --: | --: | --: | --: |")
    for capability in chosen.capability:
        for dtype in (d for d in DTYPES if SHORT[d] in chosen.dtype):
            for r in chosen.r:
                for u in usages(capability, dtype, r):
                    cells = (u.kernel, u.dtype, u.r, f"{u.capability / 10}", u.registers, u.stack, u.shared)
                    print("|", " | ".join(map(str, cells)), "|", flush=True)
                    spilled += u.stack > 0
    if spilled:
        sys.exit(f"{spilled} configurations spill registers.")


if __name__ == "__main__":
    main()
