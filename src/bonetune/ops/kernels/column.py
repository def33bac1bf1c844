"""bat, whose transformed weight exists a tile at a time, or not at all.

    W'[a,b] = W[a,b] + scale * (W[a,b] B[a] + B[a])        y_a = sum_b x_b W'[a,b]^T        dx_b = sum_a dy_a W'[a,b]
    dW'[a,b] = dy_a^T x_b                                  dB[a] = scale * sum_b (dW'[a,b] + W[a,b]^T dW'[a,b])

W (out, in), B (out / r, r, r), x, dx (n, in), y, dy (n, out). `weight` writes W' once, for the library's products. For few rows
`product` and `product_backward` transform what is multiplied by W instead, which doubles the operations and reads W once for
each tile of rows:

    y_a = sum_b (x_b + x_b B[a]^T) W[a,b]^T + (sum_b x_b) B[a]^T
    dx_b = sum_a h_ab + (h_ab + dy_a) B[a],  h_ab = dy_a W[a,b]

with scale * B for B, rounded to W's dtype. `gradient` holds dW' on chip and never writes it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bonetune.ops.kernels.shards import shard_sum
from bonetune.ops.kernels.tiles import Tile, Tiles, added, diagonal, partials, precision, splits, width
from bonetune.ops.shards import scaled

WEIGHT: Tiles = {
    2: {16: Tile(128, 4, 3), 32: Tile(128, 4, 3), 64: Tile(128, 4, 3), 128: Tile(64, 4, 3)},
    4: {16: Tile(128, 4, 3), 32: Tile(128, 4, 3), 64: Tile(32, 8, 1), 128: Tile(16, 8, 1, 32)},
}
# For few rows. Where r is missing, registers do not hold it, and W' is written.
PRODUCT: Tiles = {
    2: {16: Tile(64, 4, 3), 32: Tile(64, 4, 3), 64: Tile(64, 4, 2), 128: Tile(32, 8, 2)},
    4: {32: Tile(16, 8, 2), 64: Tile(32, 8, 2)},
}
PRODUCT_BACKWARD: Tiles = {
    2: {16: Tile(64, 4, 3), 32: Tile(64, 4, 3), 64: Tile(64, 4, 3), 128: Tile(32, 8, 2)},
    4: {32: Tile(16, 8, 2), 64: Tile(32, 8, 2)},
}
SMALLEST_TILE = 16  # rows: tensor cores want them
# dW' has blocks * r rows and shards * part columns on chip: the larger, the less often x and dy are read from the second-level
# cache
GRADIENT: Tiles = {
    2: {
        16: Tile(32, 8, 3, blocks=4, shards=16),
        32: Tile(32, 8, 3, blocks=2, shards=8),
        64: Tile(32, 8, 3, shards=4),
        128: Tile(32, 8, 3, 64),
    },
    4: {16: Tile(32, 8, 2, blocks=2, shards=4), 32: Tile(32, 8, 2, shards=2), 64: Tile(32, 8, 1, 32)},
}


def weight(W: Tensor, B: Tensor, scale: float, plus: Tensor | None) -> Tensor:
    """scale * (W[a,b] B[a] + B[a]) + plus, (out, in) in W's dtype, rounded once; scale * B beforehand."""
    out, features = W.shape
    r, B = B.shape[-1], scaled(B, scale, W.dtype)
    total, tile = torch.empty_like(W), WEIGHT[W.element_size()][r]
    part = tile.part or r
    grid = (triton.cdiv(features, tile.rows), out // r, r // part)
    weight_kernel[grid](
        W,
        B,
        W if plus is None else plus,
        total,
        features,
        *B.stride(),
        R=r,
        PART=part,
        ROWS=tile.rows,
        PLUS=plus is not None,
        PRECISION=precision(W.dtype),
        **tile.launch,
    )
    return total


@triton.jit
def weight_kernel(
    W,
    B,
    plus,
    total,
    features,
    stride_a,
    stride_i,
    stride_j,
    R: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    PLUS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Programs: tiles of rows, row blocks, parts of a shard's columns.

    W[a] (r, in) is, as it lies in memory, (in, r): row o * in / r + b is W[a,b][o].
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(2) * PART + tl.arange(0, PART)[None, :]
    i = tl.arange(0, R)[:, None]
    inside = row < features
    block = B + tl.program_id(1) * stride_a
    matrix = tl.load(block + i * stride_i + column * stride_j)
    wide = (tl.program_id(1).to(tl.int64) * features + row) * R
    place = wide + column
    change = tl.dot(tl.load(W + wide + tl.arange(0, R)[None, :], mask=inside, other=0.0), matrix, input_precision=PRECISION)
    o = row // (features // R)
    change += tl.load(block + o * stride_i + column * stride_j, mask=inside, other=0.0).to(tl.float32)
    if PLUS:
        change += tl.load(plus + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(total + place, change, mask=inside)


def product(x: Tensor, W: Tensor, B: Tensor, bias: Tensor | None, scale: float, with_weight: bool) -> Tensor:
    """y (n, out) = x W'^T + bias in x's dtype, which is W's; without W itself unless `with_weight`. x (n, in)."""
    n, features = x.shape
    out, r = len(W), B.shape[-1]
    tile, B = PRODUCT[x.element_size()][r], scaled(B, scale, W.dtype)
    rows = _few(n, tile)
    tiles = triton.cdiv(n, rows)
    step, parts = splits(tiles * (out // r), triton.cdiv(features, width(r)))
    y = partials(parts, n, out, like=x)
    if n:
        product_kernel[(tiles, out // r, parts)](
            x,
            W,
            B,
            W if bias is None else bias,
            y,
            n,
            features,
            out,
            step,
            *B.stride(),
            R=r,
            WIDTH=width(r),
            ROWS=rows,
            WITH_WEIGHT=with_weight,
            BIAS=bias is not None,
            PRECISION=precision(x.dtype),
            **tile.launch,
        )
    return added(y, x)


@triton.jit(do_not_specialize=["n", "step"])
def product_kernel(
    x,
    W,
    B,
    bias,
    y,
    n,
    features,
    out,
    step,
    stride_a,
    stride_i,
    stride_j,
    R: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    WITH_WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Programs: tiles of rows, row blocks of W, parts of the shards. y (parts, n, out)."""
    dtype: tl.constexpr = x.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    live = row < n
    block = B + tl.program_id(1) * stride_a
    across = tl.arange(0, WIDTH)[None, :]
    own = tl.program_id(1) * R + tl.arange(0, R)
    matrix = diagonal(block, 0, WIDTH // R, across, 0, stride_j, stride_i, R, WIDTH)  # transposed, by its strides
    total = tl.zeros((ROWS, R), tl.float32)
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    first = tl.program_id(2) * step
    for group in range(first, tl.minimum(first + step, tl.cdiv(features, WIDTH))):
        column = group * WIDTH + across
        v = tl.load(x + row.to(tl.int64) * features + column, mask=live & (column < features), other=0.0)
        frozen = tl.load(W + own.to(tl.int64)[:, None] * features + column, mask=column < features, other=0.0)
        u = tl.dot(v, matrix, input_precision=PRECISION)
        if WITH_WEIGHT:
            u += v.to(tl.float32)
        sums += v.to(tl.float32)
        total = tl.dot(u.to(dtype), tl.trans(frozen), total, input_precision=PRECISION)
    folding = tl.load(block + tl.arange(0, R)[None, :] * stride_i + (tl.arange(0, WIDTH)[:, None] % R) * stride_j)
    total = tl.dot(sums.to(dtype), folding, total, input_precision=PRECISION)  # whose rows repeat, so that it sums the shards
    if BIAS:
        total += tl.where(first == 0, tl.load(bias + own).to(tl.float32), 0.0)[None, :]
    place = (tl.program_id(2).to(tl.int64) * n + row) * out + own[None, :]
    tl.store(y + place, total, mask=live)


def product_backward(dy: Tensor, W: Tensor, B: Tensor, scale: float, with_weight: bool) -> Tensor:
    """dx (n, in) = dy W' in dy's dtype, which is W's; without W itself unless `with_weight`. dy (n, out)."""
    n, out = dy.shape
    features, r = W.shape[1], B.shape[-1]
    tile, B = PRODUCT_BACKWARD[dy.element_size()][r], scaled(B, scale, W.dtype)
    rows = _few(n, tile)
    tiles, groups = triton.cdiv(n, rows), triton.cdiv(features, width(r))
    step, parts = splits(tiles * groups, out // r)
    dx = partials(parts, n, features, like=dy)
    if n:
        product_backward_kernel[(tiles, groups, parts)](
            dy,
            W,
            B,
            dx,
            n,
            features,
            out,
            step,
            *B.stride(),
            R=r,
            WIDTH=width(r),
            ROWS=rows,
            WITH_WEIGHT=with_weight,
            PRECISION=precision(dy.dtype),
            **tile.launch,
        )
    return added(dx, dy)


@triton.jit(do_not_specialize=["n", "step"])
def product_backward_kernel(
    dy,
    W,
    B,
    dx,
    n,
    features,
    out,
    step,
    stride_a,
    stride_i,
    stride_j,
    R: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    WITH_WEIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Programs: tiles of rows, groups of shards, parts of the row blocks. dx (parts, n, in)."""
    dtype: tl.constexpr = dy.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    live = row < n
    across = tl.arange(0, WIDTH)[None, :]
    column = tl.program_id(1) * WIDTH + across
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    first = tl.program_id(2) * step
    for a in range(first, tl.minimum(first + step, out // R)):
        start = dy + row.to(tl.int64) * out + a * R
        g = tl.load(start + tl.arange(0, R)[None, :], mask=live, other=0.0)
        own = (a * R + tl.arange(0, R)).to(tl.int64)[:, None]
        frozen = tl.load(W + own * features + column, mask=column < features, other=0.0)
        h = tl.dot(g, frozen, input_precision=PRECISION)
        if WITH_WEIGHT:
            total += h
        h += tl.load(start + across % R, mask=live, other=0.0).to(tl.float32)
        matrix = diagonal(B + a * stride_a, 0, WIDTH // R, across, 0, stride_i, stride_j, R, WIDTH)
        total = tl.dot(h.to(dtype), matrix, total, input_precision=PRECISION)
    place = (tl.program_id(2).to(tl.int64) * n + row) * features + column
    tl.store(dx + place, total, mask=live & (column < features))


def _few(n: int, tile: Tile) -> int:
    """Rows of a tile: the fewest that hold n, up to the table's."""
    return min(tile.rows, max(SMALLEST_TILE, triton.next_power_of_2(max(1, n))))


def gradient(x: Tensor, dy: Tensor, W: Tensor, r: int, scale: float) -> Tensor:
    """dB (out / r, r, r) in float32, of which the share dy_a^T sum_b x_b is rounded to x's dtype. x (n, in), dy (n, out), W."""
    n, features = x.shape
    out, tile = len(W), GRADIENT[x.element_size()][r]
    part = tile.part or r
    heights, groups, halves = triton.cdiv(out, r * tile.blocks), triton.cdiv(features, r * tile.shards), r // part
    step, parts = splits(heights * halves, groups)
    partial = torch.empty(parts + 1, out // r, r, r, dtype=torch.float32, device=x.device)
    partial[parts] = scale * torch.mm(dy.T, shard_sum(x, r)).float().view(-1, r, r)  # sum_b dW'[a,b] = dy_a^T sum_b x_b
    gradient_kernel[(heights, parts, halves)](
        x,
        dy,
        W,
        partial,
        n,
        features,
        out,
        step,
        scale,
        R=r,
        PART=part,
        BLOCKS=tile.blocks,
        SHARDS=tile.shards,
        ROWS=tile.rows,
        PRECISION=precision(x.dtype),
        **tile.launch,
    )
    return partial.sum(0)


@triton.jit(do_not_specialize=["n", "step"])
def gradient_kernel(
    x,
    dy,
    W,
    partial,
    n,
    features,
    out,
    step,
    scale,
    R: tl.constexpr,
    PART: tl.constexpr,
    BLOCKS: tl.constexpr,
    SHARDS: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """scale * sum_b W[a,b]^T dW'[a,b]. Programs: groups of row blocks, parts of the shards, parts of dB's columns.

    partial (parts, out / R, R, R). Laid out as ((o, b), (a, j)), dW'[a,b][o,j] of BLOCKS row blocks and SHARDS shards is one
    factor of a product with W that sums over rows and shards at once. Only what it has of a row block with itself is wanted;
    the rest is few operations beside those of dW'.
    """
    dtype: tl.constexpr = W.dtype.element_ty
    HEIGHT: tl.constexpr = BLOCKS * R
    top, inner = tl.program_id(0) * HEIGHT, tl.program_id(2) * PART
    block = top + tl.arange(0, HEIGHT)[None, :]
    across = tl.arange(0, SHARDS * PART)[None, :]
    wide = tl.arange(0, R * SHARDS)[:, None]
    total = tl.zeros((HEIGHT, BLOCKS * PART), tl.float32)
    first = tl.program_id(1) * step
    for group in range(first, tl.minimum(first + step, tl.cdiv(features, SHARDS * R))):
        column = (group * SHARDS + across // PART) * R + inner + across % PART
        change = tl.zeros((HEIGHT, SHARDS * PART), tl.float32)
        for start in range(0, n, ROWS):
            row = start + tl.arange(0, ROWS)[:, None]
            live = row < n
            g = tl.load(dy + row.to(tl.int64) * out + block, mask=live & (block < out), other=0.0)
            v = tl.load(x + row.to(tl.int64) * features + column, mask=live & (column < features), other=0.0)
            change = tl.dot(tl.trans(g), v, change, input_precision=PRECISION)
        below = tl.permute(tl.reshape(change.to(dtype), (BLOCKS, R, SHARDS, PART)), (1, 2, 0, 3))
        own, at = block // R * R + wide // SHARDS, (group * SHARDS + wide % SHARDS) * R + block % R
        frozen = tl.load(W + own.to(tl.int64) * features + at, mask=(own < out) & (at < features), other=0.0)
        below = tl.reshape(below, (R * SHARDS, BLOCKS * PART))
        total = tl.dot(tl.trans(frozen), below, total, input_precision=PRECISION)
    i, j = tl.arange(0, HEIGHT)[:, None], tl.arange(0, BLOCKS * PART)[None, :]
    place = (tl.program_id(1).to(tl.int64) * out + top + i) * R + inner + j % PART
    tl.store(partial + place, scale * total, mask=(i // R == j // PART) & (top + i < out))
