"""A batch of which each row has its own adapter: one product for all rows, each with the matrices of its adapter.

    p_i = scale[k] * v_i M_k,  k = index[i]                          a product with D
    p_i,b = scale[k] * v_i,b M_k[b],  sums_i = sum_b p_i,b           a product with blocks

v (rows, tokens, features), index (rows,) numbers the adapters; rows of -1 have none and get zeros. The adapters' tensors stay
where they are: the kernels read their addresses from a table.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bonetune.ops.kernels.tiles import folded, precision, width

# What generation needs: one token of each row. Longer rows take several tiles.
TOKENS = 16
COLUMNS = 64


def product(v: Tensor, matrices: Sequence[Tensor], index: Tensor, scales: Tensor) -> Tensor:
    """p (rows, tokens, l) in v's dtype. v (rows, tokens, r), matrices (r, l) each, index (rows,), scales (adapters,)."""
    rows, tokens, r = v.shape
    columns = matrices[0].shape[1]
    p = v.new_empty(rows, tokens, columns)
    if p.numel():
        product_kernel[(rows, triton.cdiv(tokens, TOKENS), triton.cdiv(columns, COLUMNS))](
            v,
            _addresses(matrices),
            matrices[0],
            index,
            scales,
            p,
            tokens,
            columns,
            R=r,
            TOKENS=TOKENS,
            COLUMNS=COLUMNS,
            PRECISION=precision(v.dtype),
        )
    return p


@triton.jit
def product_kernel(
    v,
    table,
    like,
    index,
    scales,
    p,
    tokens,
    columns,
    R: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Programs: rows, tiles of tokens, tiles of columns."""
    dtype: tl.constexpr = v.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)[:, None]
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    live = token < tokens
    own = tl.load(index + row)
    result = tl.zeros((TOKENS, COLUMNS), tl.float32)
    if own >= 0:
        matrix = tl.load(table + own).to(tl.pointer_type(like.dtype.element_ty))
        i = tl.arange(0, R)[:, None]
        u = tl.load(v + (row * tokens + token) * R + tl.arange(0, R)[None, :], mask=live, other=0.0)
        block = tl.load(matrix + i * columns + column, mask=column < columns, other=0.0)
        block = (tl.load(scales + own) * block.to(tl.float32)).to(dtype)
        result = tl.dot(u, block, input_precision=PRECISION)
    tl.store(p + (row * tokens + token) * columns + column, result, mask=live & (column < columns))


def block_product(
    v: Tensor, blocks: Sequence[Tensor], index: Tensor, scales: Tensor, tile: Tensor | None, transposed: bool
) -> tuple[Tensor, Tensor]:
    """(p, sums) in v's dtype. v (rows, tokens, m * r), tile, sums (rows, tokens, r), blocks (m, r, r) or (1, r, r) each.

    The tile is added to every shard of v before. `transposed`: by M[b]^T.
    """
    rows, tokens, features = v.shape
    r = blocks[0].shape[-1]
    p, sums = torch.empty_like(v), v.new_empty(rows, tokens, r)
    if v.numel():
        block_kernel[(rows, triton.cdiv(tokens, TOKENS))](
            v,
            _addresses(blocks),
            blocks[0],
            index,
            scales,
            v if tile is None else tile,
            p,
            sums,
            tokens,
            features,
            *((1, r) if transposed else (r, 1)),
            R=r,
            WIDTH=width(r),
            TOKENS=TOKENS,
            SHARED=len(blocks[0]) == 1,
            TILE=tile is not None,
            PRECISION=precision(v.dtype),
        )
    return p, sums


@triton.jit
def block_kernel(
    v,
    table,
    like,
    index,
    scales,
    tile,
    p,
    sums,
    tokens,
    features,
    stride_i,
    stride_j,
    R: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    SHARED: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Programs: rows, tiles of tokens."""
    dtype: tl.constexpr = v.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)[:, None]
    live = token < tokens
    across = tl.arange(0, WIDTH)[None, :]
    own = tl.load(index + row)
    blocks = tl.load(table + tl.maximum(own, 0)).to(tl.pointer_type(like.dtype.element_ty))
    scale = tl.where(own >= 0, tl.load(scales + tl.maximum(own, 0)), 0.0)
    shard = tl.zeros((TOKENS, WIDTH), tl.float32)
    if TILE:
        shard = tl.load(tile + (row * tokens + token) * R + across % R, mask=live, other=0.0).to(tl.float32)
    folding = tl.zeros((TOKENS, WIDTH), tl.float32)
    i = tl.arange(0, WIDTH)[:, None]
    for group in range(tl.cdiv(features, WIDTH)):
        column = group * WIDTH + across
        inside = live & (column < features)
        place = (row * tokens + token) * features + column
        u = tl.load(v + place, mask=inside, other=0.0)
        if TILE:
            u = tl.where(inside, u.to(tl.float32) + shard, 0.0).to(dtype)
        block = group * (WIDTH // R) + i // R
        offset = (i % R) * stride_i + (across % R) * stride_j
        if not SHARED:
            offset += block * R * R
        matrix = tl.load(blocks + offset, mask=(i // R == across // R) & (block < features // R), other=0.0)
        result = tl.dot(u, (scale * matrix.to(tl.float32)).to(dtype), input_precision=PRECISION)
        folding += result
        tl.store(p + place, result, mask=inside)
    place = (row * tokens + token) * R + tl.arange(0, R)[None, :]
    tl.store(sums + place, folded(folding, TOKENS, R, WIDTH), mask=live)


def _addresses(tensors: Sequence[Tensor]) -> Tensor:
    """Where the tensors lie, as a table on their device."""
    return torch.tensor([t.data_ptr() for t in tensors], dtype=torch.int64).to(tensors[0].device, non_blocking=True)
