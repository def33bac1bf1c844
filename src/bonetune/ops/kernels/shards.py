"""Sums over the shards of a matrix, and a shard added to all of them.

    s = sum_b x_b                    y_b += t

x, y (n, features), a ragged last shard as far as it goes; s, t (n, r). Both are bound by memory: each element of x or y is
read once.
"""

import triton
import triton.language as tl
from torch import Tensor

from bonetune.ops.kernels.tiles import added, folded, partials, splits

SUM_ROWS, SUM_COLUMNS = 8, 256
ADD_ROWS, ADD_COLUMNS = 32, 128


def shard_sum(x: Tensor, r: int) -> Tensor:
    """s (n, r) in x's dtype, summed in float32. x (n, features)."""
    n, features = x.shape
    groups = triton.cdiv(features, SUM_COLUMNS)
    tiles = triton.cdiv(n, SUM_ROWS)
    step, parts = splits(tiles, groups)
    sums = partials(parts, n, r, like=x)
    if n:
        sum_kernel[(tiles, parts)](x, sums, n, features, step, R=r, WIDTH=SUM_COLUMNS, ROWS=SUM_ROWS)
    return added(sums, x)


@triton.jit(do_not_specialize=["n", "step"])
def sum_kernel(x, sums, n, features, step, R: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Programs: tiles of rows, parts of the shards. sums (parts, n, R)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    first = tl.program_id(1) * step
    for group in range(first, tl.minimum(first + step, tl.cdiv(features, WIDTH))):
        column = group * WIDTH + tl.arange(0, WIDTH)[None, :]
        inside = (row < n) & (column < features)
        total += tl.load(x + row.to(tl.int64) * features + column, mask=inside, other=0.0).to(tl.float32)
    place = (tl.program_id(1).to(tl.int64) * n + row) * R + tl.arange(0, R)[None, :]
    tl.store(sums + place, folded(total, ROWS, R, WIDTH), mask=row < n)


def shard_add_(y: Tensor, t: Tensor) -> None:
    """y_b += t in place. y (n, features), t (n, r)."""
    n, features = y.shape
    if n:
        grid = (triton.cdiv(n, ADD_ROWS), triton.cdiv(features, ADD_COLUMNS))
        add_kernel[grid](y, t, n, features, R=t.shape[1], ROWS=ADD_ROWS, COLUMNS=ADD_COLUMNS)


@triton.jit(do_not_specialize=["n"])
def add_kernel(y, t, n, features, R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Programs: tiles of rows, tiles of columns."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < n) & (column < features)
    place = y + row.to(tl.int64) * features + column
    shard = tl.load(t + row * R + column % R, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, tl.load(place, mask=inside, other=0.0).to(tl.float32) + shard, mask=inside)
