"""The family's forward and backward without a transformed weight, and with as little as possible saved between them.

With y = x W'^T, dy given, s = sum_b x_b (n, r), tile_b(t) a copy of t (n, r) in every shard (derivations: docs/math.md):

* bone       y = x W^T + s D                           dD = s^T dy; dx = dy W + tile_b(dy D^T). Keeps s.
* bat-row    an input transform: z_b = x_b B[b]^T, y = (x + z) W^T + tile_a(sum_b z_b).
             dz_b = (dy W)_b + sum_a dy_a; dB[b] = dz_b^T x_b; dx_b = (dy W)_b + dz_b B[b]. Keeps x. bat-free: one B.
* bat-left   an output transform: u = x W^T + tile_a(s), y_a = (x W^T)_a + u_a B[a].
             dB[a] = u_a^T dy_a; du_a = dy_a B[a]^T flows to x W^T and to s. Keeps x W^T and s.
* bat        W'[a] = W[a] + W[a] B[a] + B[a]: `bonetune.ops.column`.

Two ways lead there. `bonetune.ops.fused` computes the frozen product itself and adds to it where it accumulates: for a
plain Linear. Here the frozen layer is called, and what it returns is updated: for quantized, sharded and hooked layers, for
dropout, for adapters of several kinds at once, and for batches of which each row has its own adapter. Products run in the
dtype of x (the autocast dtype under autocast) with the accumulation of the library's matrix products; trainable tensors
keep their own dtype and receive gradients in it.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bonetune.ops.backend import FEWEST_ROWS, Backend, use_kernels
from bonetune.ops.column import column_product
from bonetune.ops.fused import input_or_shared, output_transform
from bonetune.ops.gathered import gather
from bonetune.ops.reference import Update
from bonetune.ops.shards import (
    ShardSums,
    block_product,
    block_product_backward,
    product,
    product_gradient,
    rows,
    shard_sum,
)

# Variants that are computed alike, and together.
_SHARED, _INPUT, _OUTPUT, _COLUMN = ("bone", "mini"), ("bat-row", "bat-free"), ("bat-left",), ("bat",)
_FUSED = {
    **dict.fromkeys(_SHARED + _INPUT, input_or_shared),
    **dict.fromkeys(_OUTPUT, output_transform),
    **dict.fromkeys(_COLUMN, column_product),
}


class FrozenLinear(Protocol):
    """What an update needs of the layer it adapts: x (..., in) -> (..., out)."""

    def __call__(self, x: Tensor) -> Tensor:
        """x W^T + bias, in a tensor that may be written to."""
        ...

    def product(self, x: Tensor) -> Tensor:
        """x W^T."""
        ...

    def weight(self) -> Tensor:
        """W (out, in), dequantized or gathered if need be. Only `bat` asks for it."""
        ...

    @property
    def stored(self) -> bool:
        """Whether `weight` is the layer's own tensor, so that keeping it for backward costs nothing."""
        ...

    @property
    def bias(self) -> Tensor | None: ...

    @property
    def plain(self) -> bool:
        """Whether calling the layer is nothing but x W^T + bias, neither of them trained: no hooks, no shards, no codes."""
        ...


class PlainWeight:
    """A matrix as a `FrozenLinear`, without bias: for comparisons, where there is no layer.

    Args:
        weight: W (out, in).
    """

    stored, plain, bias = True, False, None

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def product(self, x: Tensor) -> Tensor:
        """x W^T."""
        return x @ self._weight.T

    __call__ = product

    def weight(self) -> Tensor:
        """W."""
        return self._weight


def adapted_linear(frozen: FrozenLinear, x: Tensor, updates: Sequence[Update], backend: Backend = "auto") -> Tensor:
    """y = x W^T + bias + sum_k dropout_k(x) (scale_k * Delta_k(W))^T for any mix of variants; each Delta of the frozen W.

    The same function as `bonetune.ops.reference.apply`, in its derived form, with derived gradients.

    Args:
        frozen: the layer that holds W and bias.
        x: (..., in).
        updates: the adapters' updates, each for its own rows of x.
        backend: torch, triton, or auto: `bonetune.ops.backend.use_kernels` says when that is which.

    Returns:
        y (..., out), in the dtype that the frozen layer returns for x (under autocast: the autocast dtype).

    Raises:
        InputError: triton, where its kernels cannot be used.
    """
    if not updates:
        return frozen(x)
    autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)  # which knows no meta device
    x = _autocast(x) if autocast else x
    by_row = any(u.rows is not None for u in updates)
    few_too = by_row or all(u.spec.variant in _COLUMN for u in updates)  # then kernels move fewer bytes as well
    kernels = use_kernels(backend, x, {u.spec.r for u in updates}, 1 if few_too else FEWEST_ROWS)
    fused = _FUSED[updates[0].spec.variant]
    alike = all(u.dropout is None and u.rows is None and _FUSED[u.spec.variant] is fused for u in updates)
    if not (frozen.plain and alike):
        return _around(frozen, x, updates, kernels)
    W, bias = frozen.weight(), frozen.bias
    if autocast:
        W = W if fused is column_product else _autocast(W)  # W' is built in W's dtype
        bias = None if bias is None else _autocast(bias)
    return fused(x, W, bias, updates, kernels)


def _around(frozen: FrozenLinear, x: Tensor, updates: Sequence[Update], kernels: bool) -> Tensor:
    """`adapted_linear` through the frozen layer's own forward.

    What that returns is rounded already, so nothing that is added to it can be exact in a narrow dtype: `Update.exact`
    would cost a product here and change nothing.
    """
    of = {kind: [u for u in updates if u.spec.variant in kind] for kind in (_SHARED, _INPUT, _OUTPUT, _COLUMN)}
    sums = ShardSums(x)  # through autograd, which has no derivative of the kernels'
    # some need the product without the bias, and without what other adapters add to x
    apart = bool(of[_OUTPUT] or of[_COLUMN])
    base = frozen.product(x) if apart else x
    together = {kind: gather(of[kind], base if kind is _OUTPUT else x, kernels) for kind in (_SHARED, _INPUT, _OUTPUT)}
    of |= {kind: alone for kind, (_, alone) in together.items()}
    inputs: list[tuple[Any, Tensor, Tensor]] = []  # what is added to x, and the sum of its shards
    for u in of[_INPUT]:
        z = _BlockProduct.apply(u.entering(x), u.theta, u.scale, True, kernels)
        inputs.append((u, z, shard_sum(z, u.spec.r)))
    inputs += [(g, *g.blocks(x, None, True)) for g in together[_INPUT][0]]
    if apart:
        y = base
        if inputs:
            y = y + frozen.product(_with_changes(torch.zeros_like(x), inputs))
        for u in of[_OUTPUT]:
            if u.dropout is None:
                y0, s = u.selected(base), u.selected(sums[u.spec.r])
            else:
                dropped = u.entering(x)
                y0, s = frozen.product(dropped), shard_sum(dropped, u.spec.r)
            transformed = y0 + _tiled(s, y0.shape[-1])
            y = u.added_to(y, _BlockProduct.apply(transformed, u.theta, u.scale, False, kernels))
        for g in together[_OUTPUT][0]:
            y = g.added_to(y, g.blocks(base, sums[g.spec.r], False)[0])
        for u in of[_COLUMN]:
            weight = frozen.weight() if frozen.stored else frozen.weight
            y = u.added_to(y, column_product(u.entering(x), weight, None, [u], kernels, with_weight=False))
        if frozen.bias is not None:
            y = y + frozen.bias.to(y.dtype)
    else:
        y = frozen(_with_changes(x, inputs))
    for u, _, z_sum in inputs:
        y = u.added_to(y, _tiled(z_sum, y.shape[-1]))
    for u in of[_SHARED]:
        s = u.selected(sums[u.spec.r]) if u.dropout is None else shard_sum(u.entering(x), u.spec.r)
        narrow = _SharedProduct.apply(s, u.theta, u.scale)
        if u.rows is None:
            y.unflatten(-1, (-1, narrow.shape[-1])).add_(narrow.unsqueeze(-2))
        else:
            y.index_add_(0, u.rows.on(y.device), _tiled(narrow, y.shape[-1]).to(y.dtype))
    for g in together[_SHARED][0]:
        narrow = g.shared(sums[g.spec.r])
        y.unflatten(-1, (-1, narrow.shape[-1])).add_(narrow.unsqueeze(-2))
    return y


class _SharedProduct(torch.autograd.Function):
    """bone and mini: scale * s D, for mini still narrow. s (..., r), D (r, out or mini_r) -> (..., out or mini_r)."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, D: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(s, D)
        ctx.scale = scale
        return product(rows(s), D, scale).view(*s.shape[:-1], D.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dp: Tensor) -> tuple[Tensor | None, ...]:
        s, D = ctx.saved_tensors
        dp = rows(dp)
        ds = product(dp, D.T, ctx.scale).view(s.shape) if ctx.needs_input_grad[0] else None
        dD = product_gradient(rows(s), dp, D, ctx.scale) if ctx.needs_input_grad[1] else None
        return ds, dD, None


class _BlockProduct(torch.autograd.Function):
    """p_b = scale * v_b B[b], or scale * v_b B[b]^T if `transposed`. v (..., m * r), B (m or 1, r, r) -> (..., m * r)."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, B: Tensor, scale: float, transposed: bool, kernels: bool) -> Tensor:
        ctx.save_for_backward(v, B)
        ctx.scale, ctx.transposed, ctx.kernels = scale, transposed, kernels
        p, _ = block_product(rows(v), B.mT if transposed else B, scale, summed=False, kernels=kernels)
        return p.view(v.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dp: Tensor) -> tuple[Tensor | None, ...]:
        v, B = ctx.saved_tensors
        matrices = B.mT if ctx.transposed else B
        dv, _, dM = block_product_backward(
            rows(v), matrices, ctx.scale, rows(dp), needs=ctx.needs_input_grad[:2], kernels=ctx.kernels
        )
        dB = dM.mT if dM is not None and ctx.transposed else dM
        return None if dv is None else dv.view(v.shape), dB, None, None, None


def _with_changes(x: Tensor, changes: Iterable[tuple[Any, Tensor, Tensor]]) -> Tensor:
    return functools.reduce(lambda total, change: change[0].added_to(total, change[1]), changes, x)


def _tiled(t: Tensor, features: int) -> Tensor:
    """(..., r) -> (..., features): t in every shard."""
    return t.repeat(*[1] * (t.dim() - 1), features // t.shape[-1])


def _autocast(x: Tensor) -> Tensor:
    """x as the frozen layer's product sees it under autocast, so that the updates are computed in the same dtype."""
    return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(x.device.type))
