"""What all kernels share: how large their tiles are, into how many programs they are cut, and blocks laid out as one matrix.

Tile sizes are tables by the bytes of an element and r. They were found by compiling for compute capability 8.0 and 9.0: the
largest tiles, fewest warps and most stages whose registers do not spill, in the shared memory that the smallest of these GPUs
has (99 KiB). `benchmarks.kernels` compiles them again, and a test holds them to that.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Shards of less than this many columns go through a kernel several at a time, so that rows are read in whole cache lines.
NARROWEST = 64
# Programs that a launch should have at least: three for each of the 132 multiprocessors of an H100.
PROGRAMS = 396


class Tile(NamedTuple):
    """One launch's sizes.

    Args:
        rows: of the matrix that is walked through.
        warps, stages: Triton's `num_warps`, `num_stages`.
        part: columns of a shard or of a group of shards that are made at a time; 0 is all.
        shards: how many shards' columns.
        blocks: how many row blocks.
    """

    rows: int
    warps: int
    stages: int
    part: int = 0
    shards: int = 1
    blocks: int = 1

    @property
    def launch(self) -> dict[str, int]:
        """What Triton is told."""
        return {"num_warps": self.warps, "num_stages": self.stages}


# By bytes of an element, then by r.
Tiles = dict[int, dict[int, Tile]]


def width(r: int) -> int:
    """Columns of a tile: one shard, or as many as make `NARROWEST` columns."""
    return max(r, NARROWEST)


def splits(programs: int, steps: int) -> tuple[int, int]:
    """(steps of a part, parts): how a loop of `steps` is cut, so that `programs` become enough, whatever the device."""
    step = triton.cdiv(steps, max(1, min(steps, triton.cdiv(PROGRAMS, max(1, programs)))))
    return step, triton.cdiv(steps, step)


def partials(parts: int, *shape: int, like: Tensor) -> Tensor:
    """What so many parts write to: (parts, *shape), in float32, or in the dtype of `like` where one part has the whole sum."""
    return torch.empty(parts, *shape, dtype=like.dtype if parts == 1 else torch.float32, device=like.device)


def added(parts: Tensor, like: Tensor) -> Tensor:
    """The sum of the parts, always in the same order, rounded once to the dtype of `like`."""
    return parts[0] if len(parts) == 1 else parts.sum(0).to(like.dtype)


def precision(dtype: torch.dtype) -> str:
    """How factors are multiplied: float32 in three products of tensor cores, which keep its digits, unless less is allowed.

    Less is what torch's own products are allowed. Products of narrow factors are exact.
    """
    if dtype != torch.float32:
        return "ieee"
    torchs = torch.backends.cuda.matmul  # older ones answer to the older question alone
    less = torchs.fp32_precision == "tf32" if hasattr(torchs, "fp32_precision") else torchs.allow_tf32
    return "tf32" if less else "tf32x3"


@triton.jit
def diagonal(blocks, first, count, j, stride_b, stride_i, stride_j, R: tl.constexpr, WIDTH: tl.constexpr):
    """Columns j (1, ...) of diag(M[first], M[first + 1], ...), zero beyond `count` blocks. (WIDTH, ...) in M's dtype."""
    i = tl.arange(0, WIDTH)[:, None]
    block = first + i // R
    place = block * stride_b + (i % R) * stride_i + (j % R) * stride_j
    return tl.load(blocks + place, mask=(i // R == j // R) & (block < count), other=0.0)


@triton.jit
def folded(tile, ROWS: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr):
    """The sum of a tile's shards: (ROWS, WIDTH) -> (ROWS, R)."""
    if WIDTH == R:
        return tile
    else:  # noqa: RET505  (Triton compiles only one of two branches, and both without this)
        return tl.sum(tl.reshape(tile, (ROWS, WIDTH // R, R)), axis=1)
