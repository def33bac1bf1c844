"""Sums and products over the shards of a matrix: what the fast forms are made of.

A matrix v (n, m * r) has m shards v_b (n, r); n counts tokens. Nothing here knows of adapters or of autograd. Products
accumulate as the library's do (in float32 for narrow dtypes) and round once. Where `kernels` says so, Triton's compute the same
(`bonetune.ops.operators`); whether they can, `bonetune.ops.backend` decides.
"""

import torch
from torch import Tensor

from bonetune.ops import operators

# Generation, mostly: at so few rows it is what is read that costs, and what is called.
FEW_ROWS = 16
# Elementwise steps between products go through this many bytes of a matrix at a time: a few such parts fit a CPU's cache.
PART_BYTES = 1 << 21


def rows(x: Tensor) -> Tensor:
    """(..., features) -> (n, features), contiguous: x itself where that is possible."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def shard_sum(x: Tensor, r: int, *, kernels: bool = False) -> Tensor:
    """s = sum_b x_b: (..., in) -> (..., r), in x's dtype. A ragged last shard counts as filled up with zeros."""
    if kernels:
        return operators.shard_sum(rows(x), r).view(*x.shape[:-1], r)
    # the dtype is named because CUDA's autocast sums in float32 otherwise
    *leading, features = x.shape
    tail = features % r
    if not tail:
        return x.reshape(*leading, features // r, r).sum(-2, dtype=x.dtype)
    return x[..., :-tail].unflatten(-1, (-1, r)).sum(-2, dtype=x.dtype) + torch.nn.functional.pad(x[..., -tail:], (0, r - tail))


class ShardSums(dict[int, Tensor]):
    """Shard sums of one tensor by r, each computed when it is first asked for."""

    def __init__(self, x: Tensor, *, kernels: bool = False) -> None:
        super().__init__()
        self.x, self.kernels = x, kernels

    def __missing__(self, r: int) -> Tensor:
        self[r] = shard_sum(self.x, r, kernels=self.kernels)
        return self[r]


def add_to_every_shard_(y: Tensor, t: Tensor, *, kernels: bool = False) -> Tensor:
    """y_b += t for every shard b, in place, a ragged last shard as far as it goes. y (n, m * r), t (n, r)."""
    if kernels:
        operators.shard_add_(y, t)
        return y
    tail = y.shape[-1] % t.shape[-1]
    whole = y[:, :-tail] if tail else y
    whole.unflatten(-1, (-1, t.shape[-1])).add_(t.unsqueeze(-2))
    if tail:
        y[:, -tail:].add_(t[:, :tail])
    return y


def plus_every_shard(y: Tensor, t: Tensor) -> Tensor:
    """y_b + t for every shard b, a new matrix. y (n, m * r), t (n, r)."""
    return (y.unflatten(-1, (-1, t.shape[-1])) + t.unsqueeze(-2)).flatten(-2)


def few(v: Tensor) -> bool:
    """Whether v has so few rows that casting an adapter's tensor costs more than multiplying in that tensor's own dtype."""
    return v.shape[0] <= FEW_ROWS


def scaled(theta: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Scale * theta in `dtype`, rounded once."""
    if scale != 1:
        theta = theta.to(torch.promote_types(theta.dtype, dtype)) * scale
    return theta if theta.dtype == dtype else theta.to(dtype)


def product(v: Tensor, matrix: Tensor, scale: float = 1.0) -> Tensor:
    """Scale * v M, in v's dtype. v (n, k), M (k, l) an adapter's tensor in its own dtype."""
    if few(v):
        return scaled(torch.mm(v.to(matrix.dtype), matrix), scale, v.dtype)
    return v @ scaled(matrix, scale, v.dtype)


def product_gradient(v: Tensor, dp: Tensor, like: Tensor, scale: float) -> Tensor:
    """Scale * v^T dp, the gradient of the matrix `like` (k, l) in `product`, in its dtype. v (n, k), dp (n, l) in one dtype."""
    return scaled(v.T @ dp, scale, like.dtype)


def block_product(
    v: Tensor,
    blocks: Tensor,
    scale: float = 1.0,
    *,
    tile: Tensor | None = None,
    plus: Tensor | None = None,
    into: Tensor | None = None,
    summed: bool = True,
    kernels: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(p + plus, sum_b p_b) with p_b = scale * (v_b + tile) M[b].

    v, plus (n, m * r), tile (n, r) or None in one dtype; M (m, r, r), or (1, r, r): one for all shards -> (n, m * r), (n, r) in
    that dtype. The first result may be written into `into`, which may be `plus`; the second is None unless `summed`.
    """
    r = blocks.shape[-1]
    if kernels:
        total, sums = operators.block_product(v, blocks, scale, tile, plus, summed)
        return total, sums if summed else None
    if few(v):
        shards = v.to(blocks.dtype).view(v.shape[0], v.shape[1] // r, r)
        shards = shards if tile is None else shards + tile.unsqueeze(1)
        p = shards @ blocks[0] if blocks.shape[0] == 1 else torch.bmm(shards.transpose(0, 1), blocks).transpose(0, 1)
        p = p if scale == 1 else p * scale
        p, sums = p.reshape(v.shape), p.sum(1, dtype=p.dtype).to(v.dtype) if summed else None
        p = (p if plus is None else p + plus).to(v.dtype)
        return p if into is None else into.copy_(p), sums
    matrices = scaled(blocks, scale, v.dtype)
    total, sums = torch.empty_like(v) if into is None else into, v.new_empty(len(v), r) if summed else None
    for part in _parts(v):
        p = torch.bmm(_by_shard(v[part], blocks, _rows_of(tile, part)), matrices)
        _write(p, total[part], _rows_of(plus, part), _rows_of(sums, part))
    return total, sums


def block_product_backward(
    v: Tensor,
    blocks: Tensor,
    scale: float,
    dp: Tensor,
    *,
    v_tile: Tensor | None = None,
    dp_tile: Tensor | None = None,
    plus: Tensor | None = None,
    into: Tensor | None = None,
    needs: tuple[bool, bool] = (True, True),
    summed: bool = False,
    kernels: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dv + plus, sum_b dv_b, dM) for `block_product`, where p_b has the gradient g_b = dp_b + dp_tile.

    dv_b = scale * g_b M[b]^T; dM[b] = scale * (v_b + v_tile)^T g_b, summed over b for (1, r, r); over parts of the rows in at
    least float32.
    v_tile, dp_tile (n, r) or None. `plus` may be `dp`. The first result may be written into `into`, which may be either.
    `needs` says whether dv and dM are wanted, `summed` whether the second result is.
    """
    if kernels:
        return _backward_by_kernels(v, blocks, scale, dp, v_tile, dp_tile, plus, needs, summed)
    matrices = scaled(blocks, scale, dp.dtype).mT
    total = (torch.empty_like(dp) if into is None else into) if needs[0] else None
    sums = dp.new_empty(len(dp), blocks.shape[-1]) if needs[0] and summed else None
    gradient = (
        torch.zeros(blocks.shape, dtype=torch.promote_types(v.dtype, torch.float32), device=v.device) if needs[1] else None
    )
    for part in _parts(dp):
        g = _by_shard(dp[part], blocks, _rows_of(dp_tile, part))
        if gradient is not None:
            gradient += _by_shard(v[part], blocks, _rows_of(v_tile, part)).mT @ g
        if total is not None:
            dv = torch.bmm(g, matrices)
            _write(dv, total[part], _rows_of(plus, part), _rows_of(sums, part))
    return total, sums, None if gradient is None else scaled(gradient, scale, blocks.dtype)


def _backward_by_kernels(
    v: Tensor,
    blocks: Tensor,
    scale: float,
    dp: Tensor,
    v_tile: Tensor | None,
    dp_tile: Tensor | None,
    plus: Tensor | None,
    needs: tuple[bool, bool],
    summed: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`block_product_backward`: dv and dM in one pass, unless sums over shards are wanted beside sums over rows."""
    needs_v, needs_m = needs
    total, sums, gradient = None, None, None
    if needs_v and (summed or not needs_m):
        total, sums = operators.block_product(dp, blocks.mT, scale, dp_tile, plus, summed)
    if needs_m:
        together = needs_v and total is None
        dv, dM = operators.block_backward(v, blocks, scale, dp, v_tile, dp_tile, plus, together)
        total, gradient = dv if together else total, dM.to(blocks.dtype)
    return total, sums if summed else None, gradient


def _rows_of(matrix: Tensor | None, part: slice) -> Tensor | None:
    return None if matrix is None else matrix[part]


def _parts(v: Tensor) -> list[slice]:
    """Ranges of rows; on a CPU they are small enough that what one step writes is still in the cache at the next.

    One range for a compiler, which would otherwise compile again for every number of rows.
    """
    if v.device.type != "cpu" or torch.compiler.is_compiling():
        return [slice(None)]
    step = max(FEW_ROWS, PART_BYTES // max(1, v.shape[1] * v.element_size()))
    return [slice(start, min(start + step, len(v))) for start in range(0, len(v), step)]


def _by_shard(v: Tensor, blocks: Tensor, tile: Tensor | None = None) -> Tensor:
    """V (n, m * r), plus `tile` (n, r) in every shard, as (m, n, r) for m blocks; for a single block as (1, n * m, r)."""
    r = blocks.shape[-1]
    if len(blocks) == 1:
        return (v if tile is None else plus_every_shard(v, tile)).reshape(1, -1, r)
    shards = torch.empty(len(blocks), len(v), r, dtype=v.dtype, device=v.device).copy_(v.unflatten(-1, (-1, r)).transpose(0, 1))
    return shards if tile is None else shards.add_(tile)


def _write(p: Tensor, total: Tensor, plus: Tensor | None, sums: Tensor | None) -> None:
    """Total = p + plus and sums = sum_b p_b, for p laid out by `_by_shard`, which is written to."""
    r, single = p.shape[-1], len(p) == 1
    shards = p.view(len(total), -1, r).transpose(0, 1) if single else p
    if sums is not None:
        torch.sum(shards, 0, out=sums)
    if plus is not None:
        # added before it is laid out by token again: a sum of two layouts is slower than a copy and a sum of one
        p.add_(plus.reshape(p.shape) if single else plus.unflatten(-1, (-1, r)).transpose(0, 1).contiguous())
    total.unflatten(-1, (-1, r)).copy_(shards.transpose(0, 1))
