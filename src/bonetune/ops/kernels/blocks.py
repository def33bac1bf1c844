"""Each shard of a matrix times a block of its own: bat-row and bat-free transform what enters so, bat-left what leaves.

    p_b = scale * u_b M[b],  u_b = v_b + tile          total = p + plus,  sums = sum_b p_b
    dv_b = scale * g_b M[b]^T,  g_b = dp_b + tile      total = dv + plus;  dM[b] = scale * u_b^T g_b

v, dp, plus (n, m * r), tile, sums (n, r), M (m, r, r), or (1, r, r): one for all shards, with any strides. Narrow shards are
multiplied several at a time by diag(M[b], M[b + 1], ...): the zeros cost nothing, because all of this is bound by memory. M is
scaled and rounded to v's dtype beforehand, u and g are rounded once the tile is added.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bonetune.ops.kernels.tiles import Tile, Tiles, added, diagonal, folded, partials, precision, splits, width
from bonetune.ops.shards import scaled

PRODUCT: Tiles = {
    2: {16: Tile(64, 4, 3, 64), 32: Tile(64, 4, 3, 64), 64: Tile(64, 4, 3, 64), 128: Tile(64, 8, 1, 128)},
    4: {16: Tile(32, 4, 2, 64), 32: Tile(32, 8, 2, 64), 64: Tile(32, 4, 2, 64), 128: Tile(16, 8, 1, 64)},
}
# dM, and dv in the same pass
BACKWARD: Tiles = {
    2: {16: Tile(32, 4, 3), 32: Tile(64, 8, 1), 64: Tile(64, 8, 1)},
    4: {16: Tile(16, 4, 1), 32: Tile(16, 4, 3)},
}
# dM alone, where the registers do not hold both: dv is a product of its own then
GRADIENT: Tiles = {
    2: {16: Tile(64, 8, 2), 32: Tile(64, 8, 2), 64: Tile(64, 8, 2), 128: Tile(64, 8, 2)},
    4: {16: Tile(32, 8, 3), 32: Tile(32, 8, 3), 64: Tile(32, 8, 3), 128: Tile(16, 8, 2)},
}


def block_product(
    v: Tensor, blocks: Tensor, scale: float, tile: Tensor | None, plus: Tensor | None, summed: bool
) -> tuple[Tensor, Tensor]:
    """(total, sums), both in v's dtype; sums is empty unless `summed`."""
    n, features = v.shape
    r, blocks = blocks.shape[-1], scaled(blocks, scale, v.dtype)
    tile_sizes = PRODUCT[v.element_size()][r]
    groups, tiles = triton.cdiv(features, width(r)), triton.cdiv(n, tile_sizes.rows)
    step, parts = splits(tiles, groups)
    total, halves = torch.empty_like(v), width(r) // tile_sizes.part
    sums = partials(parts, n if summed else 0, r, like=v)
    if n:
        product_kernel[(tiles, parts, halves)](
            v,
            blocks,
            v if tile is None else tile,
            v if plus is None else plus,
            total,
            sums,
            n,
            features,
            len(blocks),
            step,
            *blocks.stride(),
            R=r,
            WIDTH=width(r),
            PART=tile_sizes.part,
            ROWS=tile_sizes.rows,
            SHARED=len(blocks) == 1,
            TILE=tile is not None,
            PLUS=plus is not None,
            SUMS=summed,
            PRECISION=precision(v.dtype),
            **tile_sizes.launch,
        )
    return total, added(sums, v)


@triton.jit(do_not_specialize=["n", "step"])
def product_kernel(
    v,
    blocks,
    tile,
    plus,
    total,
    sums,
    n,
    features,
    count,
    step,
    stride_b,
    stride_i,
    stride_j,
    R: tl.constexpr,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    SHARED: tl.constexpr,
    TILE: tl.constexpr,
    PLUS: tl.constexpr,
    SUMS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Programs: tiles of rows, parts of the shards, parts of a group's columns. sums (parts, n, R).

    PART is WIDTH, or less where WIDTH is R.
    """
    dtype: tl.constexpr = v.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    live = row < n
    across = tl.arange(0, WIDTH)[None, :]
    own = tl.program_id(2) * PART + tl.arange(0, PART)[None, :]
    shard = tl.zeros((ROWS, WIDTH), tl.float32)
    if TILE:
        shard = tl.load(tile + row * R + across % R, mask=live, other=0.0).to(tl.float32)
    folding = tl.zeros((ROWS, PART), tl.float32)
    matrix = tl.zeros((WIDTH, PART), dtype)
    if SHARED:
        matrix = diagonal(blocks, 0, WIDTH // R, own, 0, stride_i, stride_j, R, WIDTH)
    first = tl.program_id(1) * step
    for group in range(first, tl.minimum(first + step, tl.cdiv(features, WIDTH))):
        column = group * WIDTH + across
        inside = live & (column < features)
        u = tl.load(v + row.to(tl.int64) * features + column, mask=inside, other=0.0)
        if TILE:
            u = tl.where(inside, u.to(tl.float32) + shard, 0.0).to(dtype)
        if not SHARED:
            matrix = diagonal(blocks, group * (WIDTH // R), count, own, stride_b, stride_i, stride_j, R, WIDTH)
        p = tl.dot(u, matrix, input_precision=PRECISION)
        if SUMS:
            folding += p
        inside = live & (group * WIDTH + own < features)
        place = row.to(tl.int64) * features + group * WIDTH + own
        if PLUS:
            p += tl.load(plus + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(total + place, p, mask=inside)
    if SUMS:
        NARROW: tl.constexpr = R if PART > R else PART
        column = tl.program_id(2) * PART + tl.arange(0, NARROW)[None, :]
        place = (tl.program_id(1).to(tl.int64) * n + row) * R + column
        tl.store(sums + place, folded(folding, ROWS, NARROW, PART), mask=live)


def block_backward(
    v: Tensor,
    blocks: Tensor,
    scale: float,
    dp: Tensor,
    v_tile: Tensor | None,
    dp_tile: Tensor | None,
    plus: Tensor | None,
    needs_v: bool,
) -> tuple[Tensor, Tensor]:
    """(total, dM): total in dp's dtype, empty unless it is needed; dM (m or 1, r, r) in float32."""
    size, r = dp.element_size(), blocks.shape[-1]
    together = needs_v and r in BACKWARD[size]
    total = torch.empty_like(dp) if together else dp.new_empty(0)
    tile = (BACKWARD if together else GRADIENT)[size][r]
    gradient = _backward(v, blocks, scale, dp, v_tile, dp_tile, plus, total, together, tile)
    if needs_v and not together:
        total, _ = block_product(dp, blocks.mT, scale, dp_tile, plus, False)
    return total, gradient


def _backward(
    v: Tensor,
    blocks: Tensor,
    scale: float,
    dp: Tensor,
    v_tile: Tensor | None,
    dp_tile: Tensor | None,
    plus: Tensor | None,
    total: Tensor,
    needs_v: bool,
    tile: Tile,
) -> Tensor:
    """One pass, which writes to `total` and returns dM."""
    n, features = dp.shape
    r, shared = blocks.shape[-1], len(blocks) == 1
    groups, steps = triton.cdiv(features, width(r)), max(1, triton.cdiv(n, tile.rows))
    step, parts = splits(groups, steps)
    partial = torch.empty(parts, features // r, r, r, dtype=torch.float32, device=dp.device)
    matrices = scaled(blocks, scale, dp.dtype) if needs_v else blocks
    backward_kernel[(groups, parts)](
        v,
        matrices,
        dp,
        v if v_tile is None else v_tile,
        dp if dp_tile is None else dp_tile,
        dp if plus is None else plus,
        total,
        partial,
        n,
        features,
        step,
        scale,
        *matrices.stride(),
        R=r,
        WIDTH=width(r),
        ROWS=tile.rows,
        SHARED=shared,
        V_TILE=v_tile is not None,
        DP_TILE=dp_tile is not None,
        PLUS=plus is not None,
        NEEDS_V=needs_v,
        PRECISION=precision(dp.dtype),
        **tile.launch,
    )
    return partial.sum((0, 1)).unsqueeze(0) if shared else partial.sum(0)


@triton.jit(do_not_specialize=["n", "step"])
def backward_kernel(
    v,
    blocks,
    dp,
    v_tile,
    dp_tile,
    plus,
    total,
    partial,
    n,
    features,
    step,
    scale,
    stride_b,
    stride_i,
    stride_j,
    R: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    SHARED: tl.constexpr,
    V_TILE: tl.constexpr,
    DP_TILE: tl.constexpr,
    PLUS: tl.constexpr,
    NEEDS_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Programs: groups of shards, parts of the rows. partial (parts, features / R, R, R)."""
    dtype: tl.constexpr = dp.dtype.element_ty
    across = tl.arange(0, WIDTH)[None, :]
    column = tl.program_id(0) * WIDTH + across
    count, at = features // R, tl.program_id(0) * (WIDTH // R)
    gradient = tl.zeros((WIDTH, WIDTH), tl.float32)
    matrix = tl.zeros((WIDTH, WIDTH), dtype)
    if NEEDS_V:  # transposed, by its strides
        between = 0 if SHARED else stride_b
        matrix = diagonal(blocks, at, count, across, between, stride_j, stride_i, R, WIDTH)
    first = tl.program_id(1) * step
    for number in range(first, tl.minimum(first + step, tl.cdiv(n, ROWS))):
        row = number * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (row < n) & (column < features)
        place = row.to(tl.int64) * features + column
        g = tl.load(dp + place, mask=inside, other=0.0)
        if DP_TILE:
            shard = tl.load(dp_tile + row * R + across % R, mask=inside, other=0.0)
            g = (g.to(tl.float32) + shard.to(tl.float32)).to(dtype)
        u = tl.load(v + place, mask=inside, other=0.0)
        if V_TILE:
            shard = tl.load(v_tile + row * R + across % R, mask=inside, other=0.0)
            u = (u.to(tl.float32) + shard.to(tl.float32)).to(dtype)
        gradient = tl.dot(tl.trans(u), g, gradient, input_precision=PRECISION)
        if NEEDS_V:
            dv = tl.dot(g, matrix, input_precision=PRECISION)
            if PLUS:
                dv += tl.load(plus + place, mask=inside, other=0.0).to(tl.float32)
            tl.store(total + place, dv, mask=inside)
    i = tl.arange(0, WIDTH)[:, None]
    block = at + i // R
    place = ((tl.program_id(1) * count + block) * R + i % R) * R + across % R
    tl.store(partial + place, scale * gradient, mask=(i // R == across // R) & (block < count))
