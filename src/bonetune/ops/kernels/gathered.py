"""A batch of which each row has its own adapter: one product for all rows, each with the matrices of its adapter.

    p_i = scale[k] * v_i M_k,  k = index[i]                          a product with D
    p_i,b = scale[k] * v_i,b M_k[b],  sums_i = sum_b p_i,b           a product with blocks

v (rows, tokens, features), index (rows) numbers the adapters; rows of -1 have none and get zeros. The adapters' tensors stay
where they are: the kernels read their addresses from a table.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from bonetune.ops.kernels.tiles import Tile, Tiles, diagonal, folded, precision, width

# Tokens of a row in a tile: generation has one, and tensor cores want 16. Longer rows take several tiles.
TOKENS = 16
COLUMNS = 64  # of the result, in a tile of `product`
BLOCKS: Tiles = {
    2: {16: Tile(16, 4, 3), 32: Tile(16, 4, 3), 64: Tile(16, 4, 3), 128: Tile(16, 8, 1)},
    4: {16: Tile(16, 4, 2), 32: Tile(16, 4, 2), 64: Tile(16, 8, 1), 128: Tile(16, 8, 1, 64)},
}


def product(v: Tensor, matrices: Sequence[Tensor], index: Sequence[int], scales: Sequence[float]) -> Tensor:
    """p (rows, tokens, l) in v's dtype. v (rows, tokens, r), matrices (r, l) each, index (rows), scales (adapters)."""
    rows, tokens, r = v.shape
    columns = matrices[0].shape[1]
    p = v.new_empty(rows, tokens, columns)
    if p.numel():
        product_kernel[(rows, triton.cdiv(tokens, TOKENS), triton.cdiv(columns, COLUMNS))](
            v,
            _addresses(matrices),
            matrices[0],
            _table(tuple(index), torch.int32, v.device),
            _table(tuple(scales), torch.float32, v.device),
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
    v: Tensor, blocks: Sequence[Tensor], index: Sequence[int], scales: Sequence[float], tile: Tensor | None, transposed: bool
) -> tuple[Tensor, Tensor]:
    """(p, sums) in v's dtype. v (rows, tokens, m * r), tile, sums (rows, tokens, r), blocks (m, r, r) or (1, r, r) each.

    The tile is added to every shard of v before. `transposed`: by M[b]^T.
    """
    rows, tokens, features = v.shape
    r = blocks[0].shape[-1]
    p, sums, sizes = torch.empty_like(v), v.new_empty(rows, tokens, r), BLOCKS[v.element_size()][r]
    part = sizes.part or width(r)
    if v.numel():
        block_kernel[(rows, triton.cdiv(tokens, sizes.rows), width(r) // part)](
            v,
            _addresses(blocks),
            blocks[0],
            _table(tuple(index), torch.int32, v.device),
            _table(tuple(scales), torch.float32, v.device),
            v if tile is None else tile,
            p,
            sums,
            tokens,
            features,
            *((1, r) if transposed else (r, 1)),
            R=r,
            WIDTH=width(r),
            PART=part,
            TOKENS=sizes.rows,
            SHARED=len(blocks[0]) == 1,
            TILE=tile is not None,
            PRECISION=precision(v.dtype),
            **sizes.launch,
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
    PART: tl.constexpr,
    TOKENS: tl.constexpr,
    SHARED: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Programs: rows, tiles of tokens, parts of a group's columns (where a group is one shard)."""
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
    own_columns = tl.program_id(2) * PART + tl.arange(0, PART)[None, :]
    folding = tl.zeros((TOKENS, PART), tl.float32)
    between = 0 if SHARED else R * R
    for group in range(tl.cdiv(features, WIDTH)):
        column = group * WIDTH + across
        inside = live & (column < features)
        u = tl.load(v + (row * tokens + token) * features + column, mask=inside, other=0.0)
        if TILE:
            u = tl.where(inside, u.to(tl.float32) + shard, 0.0).to(dtype)
        at = group * (WIDTH // R)
        matrix = diagonal(blocks, at, features // R, own_columns, between, stride_i, stride_j, R, WIDTH)
        result = tl.dot(u, (scale * matrix).to(dtype), input_precision=PRECISION)
        folding += result
        column = group * WIDTH + own_columns
        tl.store(p + (row * tokens + token) * features + column, result, mask=live & (column < features))
    NARROW: tl.constexpr = R if PART > R else PART
    place = (row * tokens + token) * R + tl.program_id(2) * PART + tl.arange(0, NARROW)[None, :]
    tl.store(sums + place, folded(folding, TOKENS, NARROW, PART), mask=live)


def _addresses(tensors: Sequence[Tensor]) -> Tensor:
    """Where the tensors lie."""
    return _table(tuple(t.data_ptr() for t in tensors), torch.int64, tensors[0].device)


@lru_cache(maxsize=4096)
def _table(values: tuple[int | float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values on a device: kept, since a layer asks for the same at each token and a copy would wait for the device."""
    return torch.tensor(values, dtype=dtype).to(device)
