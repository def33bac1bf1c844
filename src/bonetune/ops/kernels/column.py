"""bat, whose transformed weight exists a tile at a time.

    W'[a,b] = W[a,b] + scale * (W[a,b] B[a] + B[a])        y_a = sum_b x_b W'[a,b]^T        dx_b = sum_a dy_a W'[a,b]
    dW'[a,b] = dy_a^T x_b                                  dB[a] = scale * sum_b (dW'[a,b] + W[a,b]^T dW'[a,b])

W (out, in), B (out / r, r, r), x, dx (n, in), y, dy (n, out). `product` and `product_backward` transform each tile of W again
for every tile of rows, which costs r / rows more operations: they are for few rows. For many, `weight` writes W' once, for
the library's products. `gradient` holds dW' on chip and never writes it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bonetune.ops.kernels.tiles import Tile, Tiles, diagonal, precision, splits, width

WEIGHT: Tiles = {
    2: {16: Tile(128, 4, 3), 32: Tile(128, 4, 3), 64: Tile(128, 4, 3), 128: Tile(128, 8, 3)},
    4: {16: Tile(128, 4, 3), 32: Tile(128, 4, 3), 64: Tile(64, 8, 2), 128: Tile(64, 8, 2, 32)},
}
PRODUCT: Tiles = {
    2: {16: Tile(32, 4, 3, 64), 32: Tile(32, 4, 3, 64), 64: Tile(32, 4, 3, 64), 128: Tile(32, 8, 1, 64)},
    4: {16: Tile(32, 4, 3, 64), 32: Tile(32, 8, 3, 64), 64: Tile(16, 8, 1, 32), 128: Tile(16, 8, 1, 32, height=32)},
}
PRODUCT_BACKWARD: Tiles = {
    2: {16: Tile(32, 4, 3, 64), 32: Tile(32, 4, 3, 64), 64: Tile(32, 4, 3, 64), 128: Tile(32, 8, 1, 64)},
    4: {16: Tile(32, 4, 3, 64), 32: Tile(16, 8, 2, 64), 64: Tile(32, 4, 1, 32), 128: Tile(16, 8, 1, 32, height=32)},
}
# dW' has r rows and part * shards columns on chip: the larger, the less often x and dy are read from the second-level cache
GRADIENT: Tiles = {
    2: {16: Tile(64, 4, 2, 16, 8), 32: Tile(64, 4, 3, 32, 4), 64: Tile(64, 8, 3, 64, 2), 128: Tile(64, 8, 2, 64, 1)},
    4: {16: Tile(64, 4, 1, 16, 8), 32: Tile(32, 8, 2, 32, 2), 64: Tile(16, 8, 2, 64, 1), 128: Tile(16, 8, 1, 16, 1, height=64)},
}


def weight(W: Tensor, B: Tensor, scale: float, plus: Tensor | None) -> Tensor:
    """scale * (W[a,b] B[a] + B[a]) + plus, (out, in) in W's dtype, rounded once."""
    out, features = W.shape
    r = B.shape[-1]
    total, tile = torch.empty_like(W), WEIGHT[W.element_size()][r]
    part = tile.part or r
    grid = (triton.cdiv(features, tile.rows), out // r, r // part)
    weight_kernel[grid](
        W,
        B,
        W if plus is None else plus,
        total,
        features,
        scale,
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
    scale,
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
    dtype: tl.constexpr = W.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(2) * PART + tl.arange(0, PART)[None, :]
    i = tl.arange(0, R)[:, None]
    inside = row < features
    block = B + tl.program_id(1) * stride_a
    matrix = (scale * tl.load(block + i * stride_i + column * stride_j).to(tl.float32)).to(dtype)
    wide = (tl.program_id(1).to(tl.int64) * features + row) * R
    place = wide + column
    change = tl.dot(tl.load(W + wide + tl.arange(0, R)[None, :], mask=inside, other=0.0), matrix, input_precision=PRECISION)
    o = row // (features // R)
    change += scale * tl.load(block + o * stride_i + column * stride_j, mask=inside, other=0.0).to(tl.float32)
    if PLUS:
        change += tl.load(plus + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(total + place, change, mask=inside)


@triton.jit
def transformed(
    W,
    B,
    start,
    group,
    part,
    features,
    scale,
    stride_a,
    stride_i,
    stride_j,
    R: tl.constexpr,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
    HEIGHT: tl.constexpr,
    WITH_WEIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """W' from row `start`, of the columns part * PART ... of a group of WIDTH, rounded once to W's dtype. (HEIGHT, PART).

    Without W itself unless WITH_WEIGHT.
    """
    dtype: tl.constexpr = W.dtype.element_ty
    o = start + tl.arange(0, HEIGHT)[:, None]
    k = group * WIDTH + tl.arange(0, WIDTH)[None, :]
    across = part * PART + tl.arange(0, PART)[None, :]
    column = group * WIDTH + across
    row = W + o.to(tl.int64) * features
    block = B + start // R * stride_a
    frozen = tl.load(row + k, mask=k < features, other=0.0)
    matrix = (scale * diagonal(block, 0, WIDTH // R, across, 0, stride_i, stride_j, R, WIDTH)).to(dtype)
    changed = tl.dot(frozen, matrix, input_precision=PRECISION)
    changed += scale * tl.load(block + (o % R) * stride_i + (across % R) * stride_j).to(tl.float32)
    if WITH_WEIGHT:
        changed += tl.load(row + column, mask=column < features, other=0.0).to(tl.float32)
    return tl.where(column < features, changed, 0.0).to(dtype)


def product(x: Tensor, W: Tensor, B: Tensor, bias: Tensor | None, scale: float, with_weight: bool) -> Tensor:
    """y (n, out) = x W'^T + bias in x's dtype, which is W's. x (n, in)."""
    n, features = x.shape
    out, r = len(W), B.shape[-1]
    y, tile = x.new_empty(n, out), PRODUCT[x.element_size()][r]
    if n:
        product_kernel[(triton.cdiv(n, tile.rows), out // (tile.height or r))](
            x,
            W,
            B,
            W if bias is None else bias,
            y,
            n,
            features,
            out,
            scale,
            *B.stride(),
            R=r,
            WIDTH=width(r),
            PART=tile.part,
            HEIGHT=tile.height or r,
            ROWS=tile.rows,
            WITH_WEIGHT=with_weight,
            BIAS=bias is not None,
            PRECISION=precision(x.dtype),
            **tile.launch,
        )
    return y


@triton.jit
def product_kernel(
    x,
    W,
    B,
    bias,
    y,
    n,
    features,
    out,
    scale,
    stride_a,
    stride_i,
    stride_j,
    R: tl.constexpr,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
    HEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    WITH_WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Programs: tiles of rows, parts of the row blocks of W."""
    start = tl.program_id(1) * HEIGHT
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    live = row < n
    total = tl.zeros((ROWS, HEIGHT), tl.float32)
    for step in range(tl.cdiv(features, PART)):
        group, part = step * PART // WIDTH, step % (WIDTH // PART)
        column = step * PART + tl.arange(0, PART)[None, :]
        v = tl.load(x + row.to(tl.int64) * features + column, mask=live & (column < features), other=0.0)
        matrix = transformed(
            W,
            B,
            start,
            group,
            part,
            features,
            scale,
            stride_a,
            stride_i,
            stride_j,
            R,
            WIDTH,
            PART,
            HEIGHT,
            WITH_WEIGHT,
            PRECISION,
        )
        total = tl.dot(v, tl.trans(matrix), total, input_precision=PRECISION)
    column = start + tl.arange(0, HEIGHT)[None, :]
    if BIAS:
        total += tl.load(bias + column).to(tl.float32)
    tl.store(y + row.to(tl.int64) * out + column, total, mask=live)


def product_backward(dy: Tensor, W: Tensor, B: Tensor, scale: float, with_weight: bool) -> Tensor:
    """dx (n, in) = dy W' in dy's dtype, which is W's. dy (n, out)."""
    n, out = dy.shape
    features, r = W.shape[1], B.shape[-1]
    dx, tile = dy.new_empty(n, features), PRODUCT_BACKWARD[dy.element_size()][r]
    if n:
        parts = triton.cdiv(features, width(r)) * (width(r) // tile.part)
        product_backward_kernel[(triton.cdiv(n, tile.rows), parts)](
            dy,
            W,
            B,
            dx,
            n,
            features,
            out,
            scale,
            *B.stride(),
            R=r,
            WIDTH=width(r),
            PART=tile.part,
            HEIGHT=tile.height or r,
            ROWS=tile.rows,
            WITH_WEIGHT=with_weight,
            PRECISION=precision(dy.dtype),
            **tile.launch,
        )
    return dx


@triton.jit
def product_backward_kernel(
    dy,
    W,
    B,
    dx,
    n,
    features,
    out,
    scale,
    stride_a,
    stride_i,
    stride_j,
    R: tl.constexpr,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
    HEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    WITH_WEIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Programs: tiles of rows, parts of groups of shards."""
    group, part = tl.program_id(1) // (WIDTH // PART), tl.program_id(1) % (WIDTH // PART)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    live = row < n
    total = tl.zeros((ROWS, PART), tl.float32)
    for number in range(out // HEIGHT):
        start = number * HEIGHT
        column = start + tl.arange(0, HEIGHT)[None, :]
        g = tl.load(dy + row.to(tl.int64) * out + column, mask=live, other=0.0)
        matrix = transformed(
            W,
            B,
            start,
            group,
            part,
            features,
            scale,
            stride_a,
            stride_i,
            stride_j,
            R,
            WIDTH,
            PART,
            HEIGHT,
            WITH_WEIGHT,
            PRECISION,
        )
        total = tl.dot(g, matrix, total, input_precision=PRECISION)
    column = group * WIDTH + part * PART + tl.arange(0, PART)[None, :]
    tl.store(dx + row.to(tl.int64) * features + column, total, mask=live & (column < features))


def gradient(x: Tensor, dy: Tensor, W: Tensor, r: int, scale: float) -> Tensor:
    """dB (out / r, r, r) in float32. x (n, in), dy (n, out), W in one dtype."""
    n, features = x.shape
    out, tile = len(W), GRADIENT[x.element_size()][r]
    groups, halves = triton.cdiv(features, r * tile.shards), r // tile.part
    height = tile.height or r
    step, parts = splits(out // tile.part, groups)
    partial = torch.empty(parts, out // r, r, r, dtype=torch.float32, device=x.device)
    gradient_kernel[(out // r, parts, halves * (r // height))](
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
        PART=tile.part,
        SHARDS=tile.shards,
        HEIGHT=height,
        ROWS=tile.rows,
        PRECISION=precision(x.dtype),
        **tile.launch,
    )
    return partial.sum(0)


@triton.jit
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
    SHARDS: tl.constexpr,
    HEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Programs: row blocks, parts of the shards, parts of dB. partial (parts, out / R, R, R).

    Of a row block and SHARDS shards, W[a,b] and dW'[a,b] are, read row by row, matrices of SHARDS * R rows: row o * SHARDS + b.
    One product of the two sums over rows and shards at once.
    """
    dtype: tl.constexpr = W.dtype.element_ty
    a = tl.program_id(0)
    block = a * R + tl.arange(0, R)[None, :]
    wide = tl.arange(0, R * SHARDS)[:, None]
    across = tl.arange(0, SHARDS * PART)[None, :]
    inner, upper = tl.program_id(2) % (R // PART) * PART, tl.program_id(2) // (R // PART) * HEIGHT
    total = tl.zeros((HEIGHT, PART), tl.float32)
    first = tl.program_id(1) * step
    for group in range(first, tl.minimum(first + step, tl.cdiv(features, SHARDS * R))):
        column = (group * SHARDS + across // PART) * R + inner + across % PART
        change = tl.zeros((R, SHARDS * PART), tl.float32)
        for start in range(0, n, ROWS):
            row = start + tl.arange(0, ROWS)[:, None]
            live = row < n
            g = tl.load(dy + row.to(tl.int64) * out + block, mask=live, other=0.0)
            v = tl.load(x + row.to(tl.int64) * features + column, mask=live & (column < features), other=0.0)
            change = tl.dot(tl.trans(g), v, change, input_precision=PRECISION)
        at = (group * SHARDS + wide % SHARDS) * R + upper + tl.arange(0, HEIGHT)[None, :]
        place = (a * R + wide // SHARDS).to(tl.int64) * features + at
        frozen = tl.load(W + place, mask=at < features, other=0.0)
        if HEIGHT < R:  # W + I, whose product is the whole sum; in float32 alone, where W loses nothing by it
            frozen += (upper + tl.arange(0, HEIGHT)[None, :] == wide // SHARDS).to(dtype)
        below = tl.reshape(change, (R * SHARDS, PART))
        total = tl.dot(tl.trans(frozen), below.to(dtype), total, input_precision=PRECISION)
        if HEIGHT == R:
            total += tl.sum(tl.reshape(change, (R, SHARDS, PART)), axis=1)
    i, j = upper + tl.arange(0, HEIGHT)[:, None], inner + tl.arange(0, PART)[None, :]
    place = ((tl.program_id(1).to(tl.int64) * (out // R) + a) * R + i) * R + j
    tl.store(partial + place, scale * total)
