"""The family's equations, term by term: slow, pure, exact in float64.

Merging, unmerging, exporting and the tests use these functions; training uses `bonetune.ops.fast`, which is tested against
them. Symbols as in `bonetune.spec` and docs/math.md: W (out, in), blocks `W[a, b]` (r, r), x (..., in). In the einsums,
a and b number the blocks, i and j are row and column inside a block, k is summed.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bonetune.spec import ShardSpec


class Rows:
    """Rows of a batch, for all layers that the batch goes through.

    Args:
        numbers: indices along the first dimension of x.
    """

    def __init__(self, numbers: Iterable[int]) -> None:
        self.numbers = tuple(numbers)
        self._on: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """The indices as int64 (rows,) on a device, where they are put once."""
        if device not in self._on:
            self._on[device] = torch.tensor(self.numbers, dtype=torch.int64, device=device)
        return self._on[device]


class Update(NamedTuple):
    """One adapter's update of one weight: `scale * Delta(W)`, linear in `theta`.

    Args:
        theta: the trainable tensor, D or B, of shape `spec.shape(out, in)`.
        spec: what the tensor means.
        scale: factor of the update.
        dropout: applied to what enters the update, never to what enters the frozen weight.
        exact: whether a BAT update multiplies on its own instead of being rounded together with what it is added to. In
            exact arithmetic there is no difference; see docs/math.md on precision.
        rows: the rows of the batch it is for; None is all of them. Merging knows no batch and takes no account of it.
    """

    theta: Tensor
    spec: ShardSpec
    scale: float = 1.0
    dropout: Callable[[Tensor], Tensor] | None = None
    exact: bool = False
    rows: Rows | None = None

    def selected(self, x: Tensor) -> Tensor:
        """The update's rows of x."""
        return x if self.rows is None else x.index_select(0, self.rows.on(x.device))

    def entering(self, x: Tensor) -> Tensor:
        """What of x enters the update: its rows, after its dropout."""
        selected = self.selected(x)
        return selected if self.dropout is None else self.dropout(selected)

    def added_to(self, y: Tensor, change: Tensor) -> Tensor:
        """Y with `change` added to the update's rows: a new tensor, in y's dtype."""
        change = change.to(y.dtype)
        return y + change if self.rows is None else y.index_add(0, self.rows.on(y.device), change)


def delta(weight: Tensor, theta: Tensor, spec: ShardSpec) -> Tensor:
    """Delta(W), what an adapter with scale 1 adds to W.

    Leading dimensions number weights that are adapted alike, each by a tensor of its own: experts, the offsets of a
    convolution's kernel.

    Args:
        weight: W (..., out, in).
        theta: D or B, (..., *spec.shape(out, in)).
        spec: what `theta` means.

    Returns:
        Delta(W) (..., out, in), in the dtype that `weight` and `theta` promote to.

    Raises:
        SpecError: the variant is not defined on (out, in).
        ValueError: `theta` has another shape.
    """
    *leading, out_features, in_features = weight.shape
    spec.check(out_features, in_features)
    expected = (*leading, *spec.shape(out_features, in_features))
    if tuple(theta.shape) != expected:
        raise ValueError(
            f"a {spec.variant} tensor on a weight of {tuple(weight.shape)} has shape {expected}, not {tuple(theta.shape)}"
        )
    r = spec.r
    dtype = torch.promote_types(weight.dtype, theta.dtype)
    if not spec.blockwise:
        D = theta.to(dtype).mT.contiguous()  # (..., out or mini_r, r), a column for each column of a shard
        D = D.repeat(*[1] * len(leading), out_features // D.shape[-2], -(-in_features // r))
        return D[..., :in_features]
    B = theta.to(dtype)
    W = weight.to(dtype).reshape(*leading, out_features // r, r, in_features // r, r)
    match spec.variant:
        case "bat":
            change = torch.einsum("...aibk,...akj->...aibj", W, B) + B[..., :, :, None, :]
        case "bat-row":
            change = torch.einsum("...aibk,...bkj->...aibj", W, B) + B.transpose(-3, -2)[..., None, :, :, :]
        case "bat-free":
            change = torch.einsum("...aibk,...kj->...aibj", W, B[..., 0, :, :]) + B[..., :, :, None, :]
        case _:
            change = torch.einsum("...aki,...akbj->...aibj", B, W) + B.mT[..., :, :, None, :]
    return change.reshape(weight.shape)


def merge(weight: Tensor, updates: Sequence[Update]) -> Tensor:
    """W' = W + sum_k scale_k * Delta_k(W), each Delta of the frozen W, so that the order of adapters is of no account.

    Args:
        weight: W (..., out, in); leading dimensions as in `delta`.
        updates: the adapters' updates.

    Returns:
        W' (..., out, in): added in float32 (float64 if W is), rounded once to W's dtype.

    Raises:
        SpecError, ValueError: as `delta`.
    """
    wide = _at_least_float32(weight)
    total = wide.clone()
    for update in updates:
        change = delta(wide, update.theta.to(wide.dtype), update.spec)
        total += change if update.scale == 1 else update.scale * change
    return total.to(weight.dtype)


def unmerge(merged: Tensor, updates: Sequence[Update]) -> Tensor:
    """The W for which `merge(W, updates)` is `merged`, by solving the updates' equation.

    Exact only up to the arithmetic and to the rounding of the merge: keep the original weight where every bit matters.

    Args:
        merged: W' (..., out, in); leading dimensions as in `delta`.
        updates: what was merged.

    Returns:
        W (..., out, in): computed in float32 (float64 if `merged` is), rounded once to the dtype of `merged`.

    Raises:
        ValueError: BAT updates of different variants or r, whose equation this does not solve.
        torch.linalg.LinAlgError: I + sum_k scale_k * B_k is singular: there the merge has lost information.
    """
    wide = _at_least_float32(merged)
    for update in updates:
        if not update.spec.blockwise:
            wide = wide - update.scale * delta(wide, update.theta.to(wide.dtype), update.spec)
    blockwise = [update for update in updates if update.spec.blockwise]
    if not blockwise:
        return wide.to(merged.dtype)
    spec = blockwise[0].spec
    if any((u.spec.variant, u.spec.r) != (spec.variant, spec.r) for u in blockwise):
        kinds = ", ".join(f"{u.spec.variant} (r={u.spec.r})" for u in blockwise)
        raise ValueError(f"Arithmetic cannot undo a merge of BAT adapters of different kinds: {kinds}.")
    *leading, out_features, in_features = merged.shape
    r = spec.r
    B = sum((u.scale * u.theta.to(wide.dtype) for u in blockwise[1:]), blockwise[0].scale * blockwise[0].theta.to(wide.dtype))
    eye = torch.eye(r, dtype=wide.dtype, device=wide.device)
    # blocks (..., out/r, in/r, r, r), so that linalg.solve's batch dimensions are a and b
    blocks = wide.reshape(*leading, out_features // r, r, in_features // r, r).transpose(-3, -2)
    if spec.variant == "bat-left":
        left = B.mT[..., :, None, :, :]
        frozen = torch.linalg.solve(eye + left, blocks - left)
    else:
        right = B[..., :, None, :, :] if spec.variant == "bat" else B[..., None, :, :, :]
        frozen = torch.linalg.solve(eye + right, blocks - right, left=False)
    return frozen.transpose(-3, -2).reshape(merged.shape).to(merged.dtype)


def apply(x: Tensor, weight: Tensor, updates: Sequence[Update], bias: Tensor | None = None) -> Tensor:
    """Y = x W^T + bias + sum_k dropout_k(x) (scale_k * Delta_k(W))^T, each to its rows, with every matrix written out.

    Args:
        x: (..., in).
        weight: W (out, in).
        updates: the adapters' updates.
        bias: (out), or None.

    Returns:
        Y (..., out), in the dtype that the operands promote to.
    """
    y = x @ weight.T
    for update in updates:
        y = update.added_to(y, update.entering(x) @ (update.scale * delta(weight, update.theta, update.spec)).T)
    return y if bias is None else y + bias


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
