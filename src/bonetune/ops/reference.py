"""The family's equations, term by term: slow, pure, exact in float64.

Merging, unmerging, exporting and the tests use these functions; training uses `bonetune.ops.fast`, which is tested against
them. Symbols as in `bonetune.spec` and docs/math.md: W (out, in), blocks `W[a, b]` (r, r), x (..., in). In the einsums,
a and b number the blocks, i and j are row and column inside a block, k is summed.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bonetune.spec import ShardSpec


class Update(NamedTuple):
    """One adapter's update of one weight: `scale * Delta(W)`, linear in `theta`.

    Args:
        theta: the trainable tensor, D or B, of shape `spec.shape(out, in)`.
        spec: what the tensor means.
        scale: factor of the update.
        dropout: applied to what enters the update, never to what enters the frozen weight.
        exact: whether a BAT update multiplies on its own instead of being rounded together with what it is added to. In
            exact arithmetic there is no difference; see docs/math.md on precision.
    """

    theta: Tensor
    spec: ShardSpec
    scale: float = 1.0
    dropout: Callable[[Tensor], Tensor] | None = None
    exact: bool = False


def delta(weight: Tensor, theta: Tensor, spec: ShardSpec) -> Tensor:
    """Delta(W) (out, in), in the dtype that `weight` and `theta` promote to.

    Raises `SpecError` where the variant is not defined, `ValueError` if `theta` has another shape than the spec's.
    """
    out_features, in_features = weight.shape
    spec.check(out_features, in_features)
    expected = spec.shape(out_features, in_features)
    if tuple(theta.shape) != expected:
        raise ValueError(
            f"a {spec.variant} tensor on a weight of {tuple(weight.shape)} has shape {expected}, not {tuple(theta.shape)}"
        )
    r = spec.r
    if not spec.blockwise:
        D = theta if spec.variant == "bone" else theta.repeat(1, out_features // spec.mini_r)
        return D.T.repeat(1, -(-in_features // r))[:, :in_features].to(torch.promote_types(weight.dtype, theta.dtype))
    dtype = torch.promote_types(weight.dtype, theta.dtype)
    B = theta.to(dtype)
    W = weight.to(dtype).reshape(out_features // r, r, in_features // r, r)
    match spec.variant:
        case "bat":
            change = torch.einsum("aibk,akj->aibj", W, B) + torch.einsum("aij->aij", B)[:, :, None, :]
        case "bat-row":
            change = torch.einsum("aibk,bkj->aibj", W, B) + torch.einsum("bij->ibj", B)[None]
        case "bat-free":
            change = torch.einsum("aibk,kj->aibj", W, B[0]) + B[0][None, :, None, :]
        case _:
            change = torch.einsum("aki,akbj->aibj", B, W) + torch.einsum("aji->aij", B)[:, :, None, :]
    return change.reshape(out_features, in_features)


def merge(weight: Tensor, updates: Sequence[Update]) -> Tensor:
    """W' = W + sum_k scale_k * Delta_k(W), each Delta of the frozen W, so that the order of adapters is of no account.

    Added in float32 (float64 if W is), rounded once to W's dtype.
    """
    wide = _at_least_float32(weight)
    total = wide.clone()
    for update in updates:
        total += update.scale * delta(wide, update.theta.to(wide.dtype), update.spec)
    return total.to(weight.dtype)


def unmerge(merged: Tensor, theta: Tensor, spec: ShardSpec, scale: float = 1.0) -> Tensor:
    """The W for which `merge(W, [Update(theta, spec, scale)])` is `merged`, by solving the update's equation.

    Computed in float32 (float64 if `merged` is). Exact only up to that arithmetic and to the rounding of the merge: keep
    the original weight where every bit matters. Raises `torch.linalg.LinAlgError` where I + scale * B is singular: there
    the merge has lost information.
    """
    wide = _at_least_float32(merged)
    if not spec.blockwise:
        return (wide - scale * delta(wide, theta.to(wide.dtype), spec)).to(merged.dtype)
    out_features, in_features = merged.shape
    r = spec.r
    B = scale * theta.to(wide.dtype)
    eye = torch.eye(r, dtype=wide.dtype, device=wide.device)
    # blocks (out/r, in/r, r, r), so that linalg.solve's batch dimensions are a and b
    blocks = wide.reshape(out_features // r, r, in_features // r, r).transpose(1, 2)
    match spec.variant:
        case "bat-left":
            left = B.mT[:, None]
            frozen = torch.linalg.solve(eye + left, blocks - left)
        case _:
            right = B[:, None] if spec.variant == "bat" else B[None]
            frozen = torch.linalg.solve(eye + right, blocks - right, left=False)
    return frozen.transpose(1, 2).reshape(out_features, in_features).to(merged.dtype)


def apply(x: Tensor, weight: Tensor, updates: Sequence[Update], bias: Tensor | None = None) -> Tensor:
    """Y = x W^T + bias + sum_k dropout_k(x) (scale_k * Delta_k(W))^T, with every matrix written out."""
    y = x @ weight.T
    for update in updates:
        dropped = x if update.dropout is None else update.dropout(x)
        y = y + dropped @ (update.scale * delta(weight, update.theta, update.spec)).T
    return y if bias is None else y + bias


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
