"""The family's forward and backward without a transformed weight, and with as little as possible saved between them.

With y = x W'^T, dy given, s = sum_b x_b (n, r), tile_b(t) a copy of t (n, r) in every shard (derivations: docs/math.md):

* bone       y = x W^T + s D                           dD = s^T dy; dx = dy W + tile_b(dy D^T). Keeps s.
* bat-row    an input transform: z_b = x_b B[b]^T, y = (x + z) W^T + tile_a(sum_b z_b).
             dz_b = (dy W)_b + sum_a dy_a; dB[b] = dz_b^T x_b; dx_b = (dy W)_b + dz_b B[b]. Keeps x. bat-free: one B.
* bat-left   an output transform: u = x W^T + tile_a(s), y_a = (x W^T)_a + u_a B[a].
             dB[a] = u_a^T dy_a; du_a = dy_a B[a]^T flows to x W^T and to s. Keeps u.
* bat        W'[a] = W[a] + W[a] B[a] + B[a]: `bonetune.ops.column`.

Two ways lead there. `bonetune.ops.fused` computes the frozen product itself and adds to it where it accumulates: for a
plain Linear. Here the frozen layer is called, and what it returns is updated: for quantized, sharded and hooked layers, for
dropout, and for adapters of several kinds at once. Products run in the dtype of x (the autocast dtype under autocast) with
the accumulation of the library's matrix products; trainable tensors keep their own dtype and receive gradients in it.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bonetune.ops.column import column_product
from bonetune.ops.fused import input_or_shared, output_transform
from bonetune.ops.reference import Update
from bonetune.ops.shards import (
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
        """W (out, in), dequantized if need be. Only `bat` asks for it."""
        ...

    @property
    def bias(self) -> Tensor | None: ...

    @property
    def plain(self) -> bool:
        """Whether calling the layer is nothing but x W^T + bias, neither of them trained: no hooks, no shards, no codes."""
        ...


def adapted_linear(frozen: FrozenLinear, x: Tensor, updates: Sequence[Update]) -> Tensor:
    """y = x W^T + bias + sum_k dropout_k(x) (scale_k * Delta_k(W))^T for any mix of variants; each Delta of the frozen W.

    x (..., in) -> y (..., out), in the dtype that the frozen layer returns for x. Same function as
    `bonetune.ops.reference.apply`.
    """
    if not updates:
        return frozen(x)
    autocast = torch.is_autocast_enabled(x.device.type)
    x = _autocast(x) if autocast else x
    fused = _FUSED[updates[0].spec.variant]
    if not frozen.plain or any(u.dropout is not None or _FUSED[u.spec.variant] is not fused for u in updates):
        return _around(frozen, x, updates)
    W, bias = frozen.weight(), frozen.bias
    if autocast:
        W = W if fused is column_product else _autocast(W)  # W' is built in W's dtype
        bias = None if bias is None else _autocast(bias)
    return fused(x, W, bias, updates)


def _around(frozen: FrozenLinear, x: Tensor, updates: Sequence[Update]) -> Tensor:
    """`adapted_linear` through the frozen layer's own forward.

    What that returns is rounded already, so nothing that is added to it can be exact in a narrow dtype: `Update.exact`
    would cost a product here and change nothing.
    """
    of = {kind: [u for u in updates if u.spec.variant in kind] for kind in (_SHARED, _INPUT, _OUTPUT, _COLUMN)}
    inputs = [(u, _BlockProduct.apply(_dropped(u, x), u.theta, u.scale, True)) for u in of[_INPUT]]
    if of[_OUTPUT] or of[_COLUMN]:
        # these need the product without the bias, and without what other adapters add to x
        y = base = frozen.product(x)
        if inputs:
            y = y + frozen.product(_sum(z for _, z in inputs))
        for u in of[_OUTPUT]:
            dropped = _dropped(u, x)
            y0 = base if dropped is x else frozen.product(dropped)
            transformed = y0 + _tiled(shard_sum(dropped, u.spec.r), y0.shape[-1])
            y = y + _BlockProduct.apply(transformed, u.theta, u.scale, False)
        for u in of[_COLUMN]:
            y = y + column_product(_dropped(u, x), frozen.weight(), None, [u], with_weight=False)
        if frozen.bias is not None:
            y = y + frozen.bias.to(y.dtype)
    else:
        y = frozen(_sum([x, *(z for _, z in inputs)]))
    for u, z in inputs:
        y = y + _tiled(shard_sum(z, u.spec.r), y.shape[-1])
    for u in of[_SHARED]:
        narrow = _SharedProduct.apply(shard_sum(_dropped(u, x), u.spec.r), u.theta, u.scale)
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
    def forward(ctx: Any, v: Tensor, B: Tensor, scale: float, transposed: bool) -> Tensor:
        ctx.save_for_backward(v, B)
        ctx.scale, ctx.transposed = scale, transposed
        return block_product(rows(v), B.mT if transposed else B, scale)[0].view(v.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dp: Tensor) -> tuple[Tensor | None, ...]:
        v, B = ctx.saved_tensors
        matrices = B.mT if ctx.transposed else B
        dv, _, dM = block_product_backward(rows(v), matrices, ctx.scale, rows(dp), needs=ctx.needs_input_grad[:2])
        dB = dM.mT if dM is not None and ctx.transposed else dM
        return None if dv is None else dv.view(v.shape), dB, None, None


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, terms)


def _tiled(t: Tensor, features: int) -> Tensor:
    """(..., r) -> (..., features): t in every shard."""
    return t.repeat(*[1] * (t.dim() - 1), features // t.shape[-1])


def _dropped(update: Update, x: Tensor) -> Tensor:
    return x if update.dropout is None else update.dropout(x)


def _autocast(x: Tensor) -> Tensor:
    """x as the frozen layer's product sees it under autocast, so that the updates are computed in the same dtype."""
    return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(x.device.type))
