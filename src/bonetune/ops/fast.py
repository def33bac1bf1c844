"""The family's forward and backward without a transformed weight, and with as little as possible saved between them.

With y = x W'^T, dy given, s = sum_b x_b (n, r), tile_b(t) a copy of t (n, r) in every shard (derivations: docs/math.md):

* bone       y = x W^T + s D                           dD = s^T dy; dx = dy W + tile_b(dy D^T). Keeps s.
* bat-row    an input transform: z_b = x_b B[b]^T, y = (x + z) W^T + tile_a(sum_b z_b).
             dz_b = (dy W)_b + sum_a dy_a; dB[b] = dz_b^T x_b; dx_b = (dy W)_b + dz_b B[b]. Keeps x. bat-free: one B.
* bat-left   an output transform: u = x W^T + tile_a(s), y_a = (x W^T)_a + u_a B[a].
             dB[a] = u_a^T dy_a; du_a = dy_a B[a]^T flows to x W^T and to s. Keeps u.
* bat        W'[a] = W[a] + W[a] B[a] + B[a], a few row blocks at a time, rebuilt in backward.
             dW' = dy^T x; dB[a] = sum_b (I + W[a,b]^T) dW'[a,b]; dx = dy W'. Keeps x.

Everything but `bat` reaches W through the frozen layer's own forward alone, so quantized, sharded and hooked layers work
as they are. Products run in the dtype of x (the autocast dtype under autocast) with the accumulation of the library's
matrix products; trainable tensors keep their own dtype and receive gradients in it.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bonetune.ops.reference import Update

# `bat` builds W' for this many elements at a time (16 MiB in float32), which bounds its scratch memory.
COL_SCRATCH_ELEMENTS = 1 << 22


class FrozenLinear(Protocol):
    """What an update needs of the layer it adapts: x (..., in) -> (..., out)."""

    def __call__(self, x: Tensor) -> Tensor:
        """x W^T + bias."""
        ...

    def product(self, x: Tensor) -> Tensor:
        """x W^T."""
        ...

    def weight(self) -> Tensor:
        """W (out, in), dequantized if need be. Only `bat` asks for it."""
        ...

    @property
    def bias(self) -> Tensor | None: ...


def adapted_linear(frozen: FrozenLinear, x: Tensor, updates: Sequence[Update]) -> Tensor:
    """y = x W^T + bias + sum_k dropout_k(x) (scale_k * Delta_k(W))^T for any mix of variants; each Delta of the frozen W.

    x (..., in) -> y (..., out), in the dtype that the frozen layer returns for x. Same function as
    `bonetune.ops.reference.apply`.
    """
    if not updates:
        return frozen(x)
    x = _autocast(x)
    by_variant = {name: [u for u in updates if u.spec.variant in names] for name, names in _GROUPS.items()}
    inputs = [(u, *_InputTransform.apply(_dropped(u, x), u.theta, u.spec.r, u.scale)) for u in by_variant["input"]]
    z: Any = sum(z for _, z, _ in inputs) if inputs else None

    if by_variant["output"] or by_variant["column"]:
        base, update = _weight_products(frozen, x, by_variant["output"], by_variant["column"])
        if z is not None:
            update = update + frozen.product(z)
        y = base + update if frozen.bias is None else base + update + frozen.bias.to(base.dtype)
    else:
        y = frozen(x) if z is None else frozen(x + z)
    for u, _, row_sum in inputs:
        y = _add_to_every_shard(y, row_sum, u.spec.r)
    for u in by_variant["shared"]:
        y = y + _SharedProduct.apply(shard_sum(_dropped(u, x), u.spec.r), u.theta, y.shape[-1], u.scale).to(y.dtype)
    return y


_GROUPS = {"shared": ("bone", "mini"), "input": ("bat-row", "bat-free"), "output": ("bat-left",), "column": ("bat",)}


def _weight_products(frozen: FrozenLinear, x: Tensor, lefts: Sequence[Update], cols: Sequence[Update]) -> tuple[Tensor, Tensor]:
    """(x W^T, its updates by bat-left and bat), or (x W'^T, 0) where one product with the `bat` weight gives both."""
    plain_cols = [u for u in cols if u.dropout is None]
    update: Any = 0
    if plain_cols and not lefts:
        base = _column_product(x, frozen.weight(), plain_cols, with_weight=True)
        cols = [u for u in cols if u.dropout is not None]
    else:
        base = frozen.product(x)
    for u in lefts:
        entering = _dropped(u, x)
        y0 = base if entering is x else frozen.product(entering)
        update = update + _OutputTransform.apply(y0, shard_sum(entering, u.spec.r), u.theta, u.scale)
    for u in cols:
        update = update + _column_product(_dropped(u, x), frozen.weight(), [u], with_weight=False)
    return base, update


def shard_sum(x: Tensor, r: int) -> Tensor:
    """s = sum_b x_b: (..., in) -> (..., r). A ragged last shard counts as filled up with zeros."""
    whole = x.shape[-1] // r * r
    s = x[..., :whole].unflatten(-1, (-1, r)).sum(-2)
    tail = x.shape[-1] - whole
    return s + torch.nn.functional.pad(x[..., whole:], (0, r - tail)) if tail else s


def _add_to_every_shard(y: Tensor, t: Tensor, r: int) -> Tensor:
    return (y.unflatten(-1, (-1, r)) + t.unsqueeze(-2).to(y.dtype)).flatten(-2)


def _dropped(update: Update, x: Tensor) -> Tensor:
    return x if update.dropout is None else update.dropout(x)


def _autocast(x: Tensor) -> Tensor:
    """x as the frozen layer's product would see it, so that the updates are computed in the same dtype."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _shards(x: Tensor, r: int) -> Tensor:
    """(n, m * r) -> (m, n, r), a view: the batch of shards that one batched product works on."""
    return x.unflatten(-1, (-1, r)).transpose(0, 1)


def _unshard(shards: Tensor) -> Tensor:
    """(m, n, r) -> (n, m * r)."""
    return shards.transpose(0, 1).flatten(1)


class _SharedProduct(torch.autograd.Function):
    """bone and mini: scale * s D, D repeated along out for mini. s (..., r), D (r, out or mini_r) -> (..., out)."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, D: Tensor, out_features: int, scale: float) -> Tensor:
        ctx.save_for_backward(s, D)
        ctx.scale = scale
        product = s @ (D * scale).to(s.dtype)
        return product.repeat(*[1] * (s.dim() - 1), out_features // D.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        s, D = ctx.saved_tensors
        dy = dy.unflatten(-1, (-1, D.shape[1])).sum(-2) if dy.shape[-1] != D.shape[1] else dy
        ds = dy @ (D * ctx.scale).to(dy.dtype).T if ctx.needs_input_grad[0] else None
        dD = (_rows(s).T @ _rows(dy)).to(D.dtype) * ctx.scale if ctx.needs_input_grad[1] else None
        return ds, dD, None, None


class _InputTransform(torch.autograd.Function):
    """bat-row and bat-free: z_b = scale * x_b B[b]^T and sum_b z_b. x (..., in), B (in/r or 1, r, r)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, B: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, B)
        ctx.scale = scale
        shards = _shards(_rows(x), r)
        z = _unshard(shards @ (B * scale).to(x.dtype).mT).reshape(x.shape)
        return z, shard_sum(z, r)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor, dsum: Tensor) -> tuple[Tensor | None, ...]:
        x, B = ctx.saved_tensors
        dz = _shards(_rows(_add_to_every_shard(dz, dsum, B.shape[-1])), B.shape[-1])
        dx = dB = None
        if ctx.needs_input_grad[0]:
            dx = _unshard(dz @ (B * ctx.scale).to(dz.dtype)).reshape(x.shape)
        if ctx.needs_input_grad[1]:
            dB = (dz.mT @ _shards(_rows(x), B.shape[-1])).to(B.dtype) * ctx.scale
            dB = dB.sum(0, keepdim=True) if B.shape[0] == 1 else dB
        return dx, dB, None, None


class _OutputTransform(torch.autograd.Function):
    """bat-left: scale * u_a B[a] with u = y0 + tile_a(s). y0 (..., out), s (..., r), B (out/r, r, r) -> (..., out)."""

    @staticmethod
    def forward(ctx: Any, y0: Tensor, s: Tensor, B: Tensor, scale: float) -> Tensor:
        u = _rows(_add_to_every_shard(y0, s, B.shape[-1]))
        ctx.save_for_backward(u, B)
        ctx.scale = scale
        return _unshard(_shards(u, B.shape[-1]) @ (B * scale).to(u.dtype)).reshape(y0.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        u, B = ctx.saved_tensors
        shards = _shards(_rows(dy), B.shape[-1])
        du = ds = dB = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            du = _unshard(shards @ (B * ctx.scale).to(dy.dtype).mT).reshape(dy.shape)
            ds = shard_sum(du, B.shape[-1])
        if ctx.needs_input_grad[2]:
            dB = (_shards(u, B.shape[-1]).mT @ shards).to(B.dtype) * ctx.scale
        return du, ds, dB, None


def _column_product(x: Tensor, weight: Tensor, updates: Sequence[Update], *, with_weight: bool) -> Tensor:
    """x (c W + sum_k scale_k (W[a,b] B_k[a] + B_k[a]))^T, c = 1 if `with_weight` else 0. x (..., in) -> (..., out)."""
    scales = tuple(u.scale for u in updates)
    return _ColumnProduct.apply(x, weight, with_weight, scales, *(u.theta for u in updates))


class _ColumnProduct(torch.autograd.Function):
    """bat: products with W', which exists only for a band of row blocks at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, with_weight: bool, scales: tuple[float, ...], *thetas: Tensor) -> Tensor:
        ctx.save_for_backward(x, W, *thetas)
        ctx.with_weight, ctx.scales = with_weight, scales
        rows = _rows(x)
        y = rows.new_empty(rows.shape[0], W.shape[0])
        for band in _bands(W, thetas):
            torch.mm(rows, _transformed(W, band, with_weight, scales, thetas).to(x.dtype).T, out=y[:, band])
        return y.reshape(*x.shape[:-1], W.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, *thetas = ctx.saved_tensors
        needs_x, needs_w, _, _, *needs_theta = ctx.needs_input_grad
        rows, dy = _rows(x), _rows(dy)
        dx = torch.zeros_like(rows) if needs_x else None
        dW = torch.empty_like(W) if needs_w else None
        dthetas = [torch.empty_like(B) if needed else None for B, needed in zip(thetas, needs_theta, strict=True)]
        for band in _bands(W, thetas):
            if dx is not None:
                dx.addmm_(dy[:, band], _transformed(W, band, ctx.with_weight, ctx.scales, thetas).to(dy.dtype))
            if dW is None and not any(needs_theta):
                continue
            change = (dy[:, band].T @ rows).to(W.dtype)  # dW' of these rows
            if dW is not None:
                dW[band] = change if ctx.with_weight else 0
            for B, scale, dB in zip(thetas, ctx.scales, dthetas, strict=True):
                r, blocks = B.shape[-1], slice(band.start // B.shape[-1], band.stop // B.shape[-1])
                # rows of W as (a, r * in/r, r): one matrix for each a, so that sum_b W[a,b]^T dW'[a,b] is one product
                wide = change.reshape(-1, r * (W.shape[1] // r), r)
                if dB is not None:
                    product = W[band].reshape(wide.shape).mT @ wide
                    dB[blocks] = scale * (product + change.reshape(-1, r, W.shape[1] // r, r).sum(2)).to(B.dtype)
                if dW is not None:
                    dW[band] += (wide @ (scale * B[blocks]).to(W.dtype).mT).reshape(dW[band].shape)
        return None if dx is None else dx.reshape(x.shape), dW, None, None, *dthetas


def _bands(W: Tensor, thetas: Sequence[Tensor]) -> list[slice]:
    """Row ranges of W that hold whole blocks of every adapter, each of about COL_SCRATCH_ELEMENTS elements."""
    step = math.lcm(*(B.shape[-1] for B in thetas))
    step *= max(1, COL_SCRATCH_ELEMENTS // (step * W.shape[1]))
    return [slice(start, min(start + step, W.shape[0])) for start in range(0, W.shape[0], step)]


def _transformed(W: Tensor, band: slice, with_weight: bool, scales: tuple[float, ...], thetas: Sequence[Tensor]) -> Tensor:
    """Rows `band` of c W + sum_k scale_k (W[a,b] B_k[a] + B_k[a]), in W's dtype."""
    rows = W[band]
    total = rows.clone() if with_weight else torch.zeros_like(rows)
    for B, scale in zip(thetas, scales, strict=True):
        r = B.shape[-1]
        B = (scale * B[band.start // r : band.stop // r]).to(W.dtype)
        wide = (B.shape[0], r * (W.shape[1] // r), r)
        total = torch.baddbmm(total.reshape(wide), rows.reshape(wide), B)
        total = (total.reshape(-1, r, W.shape[1] // r, r) + B[:, :, None, :]).reshape(rows.shape)
    return total
