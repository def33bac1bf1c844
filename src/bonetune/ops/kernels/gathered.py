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

from bonetune.ops.kernels.blocks import PRODUCT
from bonetune.ops.kernels.tiles import Tile, Tiles, added, diagonal, folded, partials, precision, splits, width

# Tokens of a row in a tile: generation has one, and tensor cores want 16. Prompts take larger tiles.
TOKENS, MANY_TOKENS = 16, 64
COLUMNS = 64  # of the result, in a tile of `product`
BLOCKS: Tiles = {
    2: {16: Tile(16, 4, 3, 64), 32: Tile(16, 4, 3, 64), 64: Tile(16, 4, 3, 64), 128: Tile(16, 8, 1, 128)},
    4: {16: Tile(16, 4, 2, 64), 32: Tile(16, 4, 2, 64), 64: Tile(16, 8, 1, 64), 128: Tile(16, 8, 1, 64)},
}


def product(v: Tensor, matrices: Sequence[Tensor], index: Sequence[int], scales: Sequence[float]) -> Tensor:
    """p (rows, tokens, l) in v's dtype. v (rows, tokens, r), matrices (r, l) each, index (rows), scales (adapters)."""
    rows, tokens, r = v.shape
    columns = matrices[0].shape[1]
    tile = MANY_TOKENS if _many(v) else TOKENS
    p, matrices = v.new_empty(rows, tokens, columns), _aligned(matrices)
    if p.numel():
        product_kernel[(rows, triton.cdiv(tokens, tile), triton.cdiv(columns, COLUMNS))](
            v,
            _addresses(matrices),
            matrices[0],
            _table(tuple(index), torch.int32, v.device),
            _table(tuple(scales), torch.float32, v.device),
            p,
            tokens,
            columns,
            R=r,
            TOKENS=tile,
            COLUMNS=COLUMNS,
            PRECISION=precision(v.dtype),
        )
    return p


@triton.jit(do_not_specialize=["tokens"])
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
        matrix = tl.multiple_of(tl.load(table + own).to(tl.pointer_type(like.dtype.element_ty)), [16])
        i = tl.arange(0, R)[:, None]
        u = tl.load(v + (row * tokens + token) * R + tl.arange(0, R)[None, :], mask=live, other=0.0)
        block = tl.load(matrix + i * columns + column, mask=column < columns, other=0.0)
        block = (tl.load(scales + own) * block.to(tl.float32)).to(dtype)
        result = tl.dot(u, block, input_precision=PRECISION)
    tl.store(p + (row * tokens + token) * columns + column, result, mask=live & (column < columns))


def block_product(
    v: Tensor,
    blocks: Sequence[Tensor],
    index: Sequence[int],
    scales: Sequence[float],
    tile: Tensor | None,
    transposed: bool,
) -> tuple[Tensor, Tensor]:
    """(p, sums) in v's dtype. v (rows, tokens, m * r), tile, sums (rows, tokens, r), blocks (m, r, r) or (1, r, r) each.

    The tile is added to every shard of v before. `transposed`: by M[b]^T.
    """
    rows, tokens, features = v.shape
    r = blocks[0].shape[-1]
    sizes = (PRODUCT if _many(v) else BLOCKS)[v.element_size()][r]
    tiles, halves = triton.cdiv(tokens, sizes.rows), width(r) // sizes.part
    step, parts = splits(rows * tiles * halves, triton.cdiv(features, width(r)))
    p, blocks = torch.empty_like(v), _aligned(blocks)
    sums = partials(parts, rows, tokens, r, like=v)
    if v.numel():
        block_kernel[(rows, tiles, parts * halves)](
            v,
            _addresses(blocks),
            blocks[0],
            _table(tuple(index), torch.int32, v.device),
            _table(tuple(scales), torch.float32, v.device),
            v if tile is None else tile,
            p,
            sums,
            rows,
            tokens,
            features,
            step,
            *((1, r) if transposed else (r, 1)),
            R=r,
            WIDTH=width(r),
            PART=sizes.part,
            TOKENS=sizes.rows,
            SHARED=len(blocks[0]) == 1,
            TILE=tile is not None,
            PRECISION=precision(v.dtype),
            **sizes.launch,
        )
    return p, added(sums, v)


@triton.jit(do_not_specialize=["rows", "tokens", "step"])
def block_kernel(
    v,
    table,
    like,
    index,
    scales,
    tile,
    p,
    sums,
    rows,
    tokens,
    features,
    step,
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
    """Programs: rows, tiles of tokens, parts of the shards times parts of a group's columns. sums (parts, rows, tokens, R)."""
    dtype: tl.constexpr = v.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)[:, None]
    live = token < tokens
    across = tl.arange(0, WIDTH)[None, :]
    part, half = tl.program_id(2) // (WIDTH // PART), tl.program_id(2) % (WIDTH // PART)
    own_columns = half * PART + tl.arange(0, PART)[None, :]
    folding = tl.zeros((TOKENS, PART), tl.float32)
    first, last = part * step, tl.minimum(part * step + step, tl.cdiv(features, WIDTH))
    own = tl.load(index + row)
    if own >= 0:
        blocks = tl.multiple_of(tl.load(table + own).to(tl.pointer_type(like.dtype.element_ty)), [16])
        scale = tl.load(scales + own)
        shard = tl.zeros((TOKENS, WIDTH), tl.float32)
        if TILE:
            shard = tl.load(tile + (row * tokens + token) * R + across % R, mask=live, other=0.0).to(tl.float32)
        between = 0 if SHARED else R * R
        for group in range(first, last):
            column = group * WIDTH + across
            inside = live & (column < features)
            u = tl.load(v + (row * tokens + token) * features + column, mask=inside, other=0.0)
            if TILE:
                u = tl.where(inside, u.to(tl.float32) + shard, 0.0).to(dtype)
            at = group * (WIDTH // R)
            matrix = diagonal(blocks, at, features // R, own_columns, between, stride_i, stride_j, R, WIDTH)
            result = tl.dot(u, (scale * matrix.to(tl.float32)).to(dtype), input_precision=PRECISION)
            folding += result
            column = group * WIDTH + own_columns
            tl.store(p + (row * tokens + token) * features + column, result, mask=live & (column < features))
    else:
        for group in range(first, last):
            column = group * WIDTH + own_columns
            nothing = tl.zeros((TOKENS, PART), tl.float32)
            tl.store(p + (row * tokens + token) * features + column, nothing, mask=live & (column < features))
    NARROW: tl.constexpr = R if PART > R else PART
    place = ((part * rows + row) * tokens + token) * R + half * PART + tl.arange(0, NARROW)[None, :]
    tl.store(sums + place, folded(folding, TOKENS, NARROW, PART), mask=live)


def _many(v: Tensor) -> bool:
    """Whether tiles are to hold many tokens. Registers hold few of float32."""
    return v.shape[1] >= MANY_TOKENS and v.element_size() == 2


def _aligned(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors; where one does not begin at a whole 16 bytes, as kernels are told it does, a copy. It is to be kept."""
    return [t if t.data_ptr() % 16 == 0 else t.clone() for t in tensors]


def _addresses(tensors: Sequence[Tensor]) -> Tensor:
    """Where the tensors lie."""
    return _table(tuple(t.data_ptr() for t in tensors), torch.int64, tensors[0].device)


@lru_cache(maxsize=1 << 15)  # layers times the batches that are in flight
def _table(values: tuple[int | float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values on a device: kept, since a layer asks for the same at each token and a copy would wait for the device."""
    return torch.tensor(values, dtype=dtype).to(device)
