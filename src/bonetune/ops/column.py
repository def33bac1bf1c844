"""`bat`, which follows the rows of W but multiplies from the right: no transform of x or y does it, so W' must exist.

W'[a,b] = W[a,b] + W[a,b] B[a] + B[a] is built for a few row blocks at a time, rounded once, used, and built again in
backward: y_a = x W'[a]^T, dW' = dy^T x, dB[a] = sum_b (I + W[a,b]^T) dW'[a,b], dx = dy W'. x is kept, W' never.

For few tokens without gradients x is transformed instead, once for each row block:
y_a = sum_b (x_b + x_b B[a]^T) W[a,b]^T + s B[a]^T.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bonetune.ops import operators
from bonetune.ops.reference import Update
from bonetune.ops.shards import few, product, rows, scaled, shard_sum

# W' is built for this many elements at a time (64 MiB in float32), which bounds the scratch memory.
SCRATCH_ELEMENTS = 1 << 24
# Up to so many rows, Triton's kernels transform what is multiplied by W: that doubles the operations, and spares three passes
# over a matrix of W's size.
FUSED_ROWS = 128
# By the bytes of an element, the r for which there are such kernels, and one that reduces dW' on chip.
FUSED = {2: (16, 32, 64, 128), 4: (32, 64)}
REDUCED = {2: (16, 32, 64, 128), 4: (16, 32, 64)}


def column_product(
    x: Tensor,
    weight: Tensor | Callable[[], Tensor],
    bias: Tensor | None,
    updates: Sequence[Update],
    kernels: bool = False,
    *,
    with_weight: bool = True,
) -> Tensor:
    """x (c W + sum_k scale_k (W[a,b] B_k[a] + B_k[a]))^T + bias, c = 1 if `with_weight` else 0. x (..., in) -> (..., out).

    `weight` is W (out, in), or a function that makes it: of a quantized or sharded weight, which is then made again in
    backward instead of being kept. With `kernels`, Triton's build W' and its gradients, where W lies row by row in x's dtype.
    """
    again, W = (None, weight) if isinstance(weight, Tensor) else (weight, weight())
    exact = any(u.exact for u in updates)
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in (x, W, *(u.theta for u in updates)))
    v, out = rows(x), W.shape[0]
    kernels = kernels and W.dtype == v.dtype and W.is_contiguous()
    fused = kernels and _fused(v, [u.theta for u in updates])
    if not (trained or fused) and len(updates) == 1 and few(v) and 4 * v.shape[0] <= updates[0].spec.r:
        y = _few_rows(v, W, updates[0], bias, with_weight)
    else:
        scales = tuple(u.scale for u in updates)
        y = _ColumnProduct.apply(v, W, again, bias, with_weight, exact, kernels, scales, *(u.theta for u in updates))
    return y.view(*x.shape[:-1], out)


def _fused(v: Tensor, thetas: Sequence[Tensor]) -> bool:
    """Whether kernels multiply v without W' being written."""
    return len(thetas) == 1 and len(v) <= FUSED_ROWS and thetas[0].shape[-1] in FUSED[v.element_size()]


def _few_rows(v: Tensor, W: Tensor, update: Update, bias: Tensor | None, with_weight: bool) -> Tensor:
    """For n rows; what they are transformed to has n / r times as many elements as W."""
    theta, scale = update.theta, update.scale
    W = rows(W).to(v.dtype)
    blocks, r, n, out = theta.shape[0], theta.shape[1], v.shape[0], W.shape[0]
    B = theta.reshape(out, r).T  # x_b times this is x_b B[a]^T for all a, side by side
    wide = v.to(theta.dtype)
    z = torch.mm(wide.view(-1, r), B).view(n, W.shape[1] // r, out)
    z, y = z if scale == 1 else z * scale, product(shard_sum(wide, r), B, scale)
    z = z.unflatten(-1, (blocks, r)).permute(2, 0, 1, 3).flatten(2)
    alone = update.exact or not with_weight
    z = (z if alone else z + wide).to(v.dtype)
    y = y.to(v.dtype) + torch.bmm(z, W.view(blocks, r, -1).mT).transpose(0, 1).flatten(1)
    if bias is not None:
        y.add_(bias)
    if with_weight and alone:
        y.addmm_(v, W.T)
    return y


class _ColumnProduct(torch.autograd.Function):
    """Products with W', which exists only for a band of row blocks at a time; with `exact`, W and W' - W multiply apart."""

    @staticmethod
    def forward(
        ctx: Any,
        v: Tensor,
        W: Tensor,
        again: Callable[[], Tensor] | None,
        bias: Tensor | None,
        with_weight: bool,
        exact: bool,
        kernels: bool,
        scales: tuple[float, ...],
        *thetas: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(v, W if again is None else None, *thetas)
        ctx.again, ctx.with_weight, ctx.kernels, ctx.scales = again, with_weight, kernels, scales
        if kernels and _fused(v, thetas):
            alone = with_weight and not exact
            y = operators.bat_product(v, W, thetas[0], bias, scales[0], alone)
            return y.addmm_(v, W.T) if with_weight and exact else y
        y = v.new_empty(len(v), len(W))
        for band in _bands(W, thetas):
            matrix = _transformed(W, band, with_weight and not exact, scales, thetas, kernels).to(v.dtype).T
            if bias is None:
                torch.mm(v, matrix, out=y[:, band])
            else:
                torch.addmm(bias[band], v, matrix, out=y[:, band])
            if with_weight and exact:
                y[:, band].addmm_(v, W[band].to(v.dtype).T)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        v, W, *thetas = ctx.saved_tensors
        W = W if ctx.again is None else ctx.again()
        needs_x, needs_w, _, _, _, _, _, _, *needs_theta = ctx.needs_input_grad
        dy = rows(dy)
        dx: Tensor | None = None
        dW = torch.empty_like(W) if needs_w else None
        dthetas = [torch.empty_like(B) if needed else None for B, needed in zip(thetas, needs_theta, strict=True)]
        if ctx.kernels and not needs_w:  # dW' is never written
            for place, (B, scale) in enumerate(zip(thetas, ctx.scales, strict=True)):
                if needs_theta[place] and B.shape[-1] in REDUCED[v.element_size()]:
                    dthetas[place] = operators.bat_gradient(v, dy, W, B.shape[-1], scale).to(B.dtype)
                    needs_theta[place] = False
            if needs_x and _fused(v, thetas):
                dx, needs_x = operators.bat_product_backward(dy, W, thetas[0], ctx.scales[0], ctx.with_weight), False
        for band in _bands(W, thetas) if needs_x or needs_w or any(needs_theta) else ():
            if needs_x:
                matrix = _transformed(W, band, ctx.with_weight, ctx.scales, thetas, ctx.kernels)
                part = dy[:, band] @ matrix.to(dy.dtype)
                # several bands are added up in float32, as one product would accumulate them
                dx = part if dx is None else dx.to(torch.promote_types(dx.dtype, torch.float32)).add_(part)
            if dW is None and not any(needs_theta):
                continue
            change = (dy[:, band].T @ v).to(W.dtype)  # dW' of these rows
            if dW is not None:
                dW[band] = change if ctx.with_weight else 0
            for B, scale, dB, needed in zip(thetas, ctx.scales, dthetas, needs_theta, strict=True):
                r, blocks = B.shape[-1], slice(band.start // B.shape[-1], band.stop // B.shape[-1])
                wide = _wide(change, r)
                if dB is not None and needed:
                    gradient = _wide(W[band], r).mT @ wide + change.view(-1, r, W.shape[1] // r, r).sum(2, dtype=change.dtype)
                    dB[blocks] = scaled(gradient, scale, B.dtype)
                if dW is not None:
                    dW[band] += (wide @ scaled(B[blocks], scale, W.dtype).mT).view(dW[band].shape)
        return None if dx is None else dx.to(v.dtype), dW, None, None, None, None, None, None, *dthetas


def _bands(W: Tensor, thetas: Sequence[Tensor]) -> list[slice]:
    """Row ranges of W that hold whole blocks of every adapter, each of about SCRATCH_ELEMENTS elements."""
    step = math.lcm(*(B.shape[-1] for B in thetas))
    step *= max(1, SCRATCH_ELEMENTS // (step * W.shape[1]))
    return [slice(start, min(start + step, len(W))) for start in range(0, len(W), step)]


def _transformed(
    W: Tensor, band: slice, with_weight: bool, scales: tuple[float, ...], thetas: Sequence[Tensor], kernels: bool
) -> Tensor:
    """Rows `band` of c W + sum_k scale_k (W[a,b] B_k[a] + B_k[a]), in W's dtype (forward under autocast: its).

    W is added last, so that only that sum is rounded at W's size; what comes before is rounded at the update's.
    """
    total: Any = None
    for theta, scale in zip(thetas, scales, strict=True):
        r = theta.shape[-1]
        blocks = theta[band.start // r : band.stop // r]
        if kernels:
            if with_weight and len(thetas) == 1:
                return operators.bat_weight(W[band], blocks, scale, W[band])
            total = operators.bat_weight(W[band], blocks, scale, total)
            continue
        B = scaled(blocks, scale, W.dtype)
        update = torch.bmm(_wide(W[band], r), B)
        update.view(len(B), r, -1, r).add_(B[:, :, None, :])
        total = update if total is None else total.view(update.shape).add_(update)
    total = total.view(-1, W.shape[1])
    return total.add_(W[band]) if with_weight else total


def _wide(matrix: Tensor, r: int) -> Tensor:
    """Rows (a * r, in) as (a, r * in/r, r): one matrix for each a, with the blocks [a, b] below each other, row by row."""
    return matrix.reshape(-1, r * (matrix.shape[1] // r), r)
