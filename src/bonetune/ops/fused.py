"""The update together with the frozen layer's product, for a plain Linear without dropout.

Small terms are laid down first and the large product accumulates on top of them, so that y is rounded once; backward makes
one product with W and adds to it in place. Formulas and symbols: `bonetune.ops.fast`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bonetune.ops.backend import SIZES
from bonetune.ops.reference import Update
from bonetune.ops.shards import (
    ShardSums,
    add_to_every_shard_,
    block_product,
    block_product_backward,
    product,
    product_gradient,
    rows,
    scaled,
    shard_sum,
)
from bonetune.spec import ShardSpec

# What a Function is told of an update besides its trainable tensor: (spec, scale, exact).
Terms = tuple[tuple[ShardSpec, float, bool], ...]


def input_or_shared(x: Tensor, W: Tensor, bias: Tensor | None, updates: Sequence[Update], kernels: bool) -> Tensor:
    """The adapted layer for updates out of bone, mini, bat-row and bat-free. x (..., in), W (out, in) -> (..., out)."""
    return _run(_InputOrShared, _input_or_shared, x, W, bias, updates, kernels)


def output_transform(x: Tensor, W: Tensor, bias: Tensor | None, updates: Sequence[Update], kernels: bool) -> Tensor:
    """The adapted layer for bat-left updates. x (..., in), W (out, in) -> (..., out)."""
    return _run(_OutputTransform, _output_transform, x, W, bias, updates, kernels)


def _run(
    function: Any, forward: Any, x: Tensor, W: Tensor, bias: Tensor | None, updates: Sequence[Update], kernels: bool
) -> Tensor:
    terms = tuple((u.spec, u.scale, u.exact) for u in updates)
    thetas = tuple(u.theta for u in updates)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *thetas)):
        y = function.apply(x, W, bias, terms, kernels, *thetas)
    else:
        y, _ = forward(x, W, bias, terms, kernels, thetas)
    # viewed out here: what a Function returns as a view may not be written to, as users do (`y += x`)
    return y.view(*x.shape[:-1], W.shape[0])


def _input_or_shared(
    x: Tensor, W: Tensor, bias: Tensor | None, terms: Terms, kernels: bool, thetas: Sequence[Tensor]
) -> tuple[Tensor, dict[int, Tensor]]:
    """Y (n, out) and the shard sums of x that were used, by r."""
    v, out = rows(x), W.shape[0]
    sums, y = ShardSums(v, kernels=kernels), bias
    # z W^T = x (W B)^T: of x and W the one with fewer rows is transformed
    by_weight = v.shape[0] > out
    frozen = rows(W) if by_weight else v
    whole, apart = frozen, None
    for (spec, scale, exact), theta in zip(terms, thetas, strict=True):
        if not spec.blockwise:
            y = _with_tiles(y, product(sums[spec.r], theta, scale), out, kernels)
            continue
        total = apart if exact else whole
        into, blocks = None if total is frozen else total, theta if by_weight else theta.mT
        total, z_sum = block_product(frozen, blocks, scale, plus=total, into=into, summed=not by_weight, kernels=kernels)
        whole, apart = (whole, total) if exact else (total, apart)
        if by_weight:
            total.unflatten(0, (-1, spec.r)).add_(_side_by_side(theta, W.shape[1], scale, W.dtype))
        elif z_sum is not None:
            y = _with_tiles(y, z_sum, out, kernels)
    for total in (whole,) if apart is None else (apart, whole):
        y = _with_product(y, *((v, total) if by_weight else (total, W)))
    assert y is not None
    return y, sums


class _InputOrShared(torch.autograd.Function):
    """y = (x + sum_k z_k) W^T + sum_k tile(t_k) + bias; t is s D (bone, mini) or sum_b z_b (bat-row, bat-free)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, terms: Terms, kernels: bool, *thetas: Tensor) -> Tensor:
        y, sums = _input_or_shared(x, W, bias, terms, kernels, thetas)
        transforms = any(spec.blockwise for spec, _, _ in terms)
        ctx.save_for_backward(x if transforms else None, W, *(None if t[0].blockwise else sums[t[0].r] for t in terms), *thetas)
        ctx.terms, ctx.kernels, ctx.shape = terms, kernels, x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, *saved = ctx.saved_tensors
        needs_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
        sums, thetas, dy = saved[: len(ctx.terms)], saved[len(ctx.terms) :], rows(dy)
        kernels, dy_sums, gradients, tiles = ctx.kernels, ShardSums(dy, kernels=ctx.kernels), [], []
        G: Any = dy @ W if needs_x or x is not None else None
        v: Any = None if x is None else rows(x)
        transforms = sum(spec.blockwise for spec, _, _ in ctx.terms)
        dx: Any = G
        for (spec, scale, _), theta, s, needed in zip(ctx.terms, thetas, sums, needs, strict=True):
            if spec.blockwise:
                transforms -= 1
                into = dx if transforms == 0 else None  # G is written to when no other term needs it
                wanted, tile = (needs_x, needed), dy_sums[spec.r]
                dx, _, dB = block_product_backward(
                    v, theta.mT, scale, G, dp_tile=tile, plus=dx, into=into, needs=wanted, kernels=kernels
                )
                gradients.append(None if dB is None else dB.mT)
                continue
            narrow = (
                dy if theta.shape[1] == len(W) else shard_sum(dy, theta.shape[1], kernels=kernels and theta.shape[1] in SIZES)
            )
            gradients.append(product_gradient(s, narrow, theta, scale) if needed else None)
            if needs_x:
                tiles.append(product(narrow, theta.T, scale))
        for t in tiles:
            add_to_every_shard_(dx, t, kernels=kernels)
        return dx.view(ctx.shape) if needs_x else None, None, None, None, None, *gradients


def _output_transform(
    x: Tensor, W: Tensor, bias: Tensor | None, terms: Terms, kernels: bool, thetas: Sequence[Tensor]
) -> tuple[Tensor, tuple[Tensor, dict[int, Tensor]]]:
    """Y (n, out), y0 = x W^T, and the shard sums of x that were used, by r."""
    v = rows(x)
    y0, sums = v @ W.T, ShardSums(v, kernels=kernels)
    exact = any(apart for _, _, apart in terms)
    y = None if exact else y0
    for (spec, scale, _), theta in zip(terms, thetas, strict=True):
        into = None if y is y0 else y
        y, _ = block_product(y0, theta, scale, tile=sums[spec.r], plus=y, into=into, summed=False, kernels=kernels)
    assert y is not None
    if bias is not None:
        y.add_(bias)
    if exact:
        y.addmm_(v, W.T)
    return y, (y0, sums)


class _OutputTransform(torch.autograd.Function):
    """y_a = y0_a + sum_k u_a B_k[a] + bias_a with y0 = x W^T, u = y0 + tile(s)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, terms: Terms, kernels: bool, *thetas: Tensor) -> Tensor:
        y, (y0, sums) = _output_transform(x, W, bias, terms, kernels, thetas)
        ctx.save_for_backward(W, y0, *(sums[spec.r] for spec, _, _ in terms), *thetas)
        ctx.terms, ctx.kernels, ctx.shape = terms, kernels, x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        W, y0, *saved = ctx.saved_tensors
        needs_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
        dy = rows(dy)
        sums, thetas = saved[: len(ctx.terms)], saved[len(ctx.terms) :]
        gradients, tiles, dx, dy0 = [], [], None, dy
        for (_, scale, _), theta, s, needed in zip(ctx.terms, thetas, sums, needs, strict=True):
            dy0, ds, dB = block_product_backward(
                y0, theta, scale, dy, v_tile=s, plus=dy0, needs=(needs_x, needed), summed=True, kernels=ctx.kernels
            )
            gradients.append(dB)
            tiles.append(ds)
        if needs_x:
            dx = dy0 @ W
            for t in tiles:
                add_to_every_shard_(dx, t, kernels=ctx.kernels)
            dx = dx.view(ctx.shape)
        return dx, None, None, None, None, *gradients


def _with_tiles(y: Tensor | None, t: Tensor, features: int, kernels: bool) -> Tensor:
    """Y + t in every shard: (n, features), where y is yet nothing, a bias (features), or such a matrix, which is written to."""
    if y is not None and y.dim() == 2:
        return add_to_every_shard_(y, t, kernels=kernels and t.shape[1] in SIZES)
    tiled = t if t.shape[1] == features else t.repeat(1, features // t.shape[1])
    return tiled if y is None else tiled.add_(y)


def _with_product(y: Tensor | None, v: Tensor, matrix: Tensor) -> Tensor:
    """Y + v M^T, where y is yet nothing, a bias (features), or a matrix (n, features), which is written to."""
    if y is None:
        return v @ matrix.T
    return torch.addmm(y, v, matrix.T) if y.dim() == 1 else y.addmm_(v, matrix.T)


def _side_by_side(theta: Tensor, features: int, scale: float, dtype: torch.dtype) -> Tensor:
    """Scale * [B[0] B[1] ...] (r, features), from B (features / r, r, r), or from (1, r, r), repeated."""
    wide = scaled(theta, scale, dtype).transpose(0, 1).flatten(1)
    return wide if wide.shape[1] == features else wide.repeat(1, features // wide.shape[1])
