"""Convolutions. A kernel of K offsets is K Linear layers, one for each offset, on a shifted x, whose results are added.

Each offset's matrix (out_channels, in_channels / groups) is adapted like a Linear's weight, by a tensor of its own: a shard
is r input channels, and a 1x1 convolution is adapted exactly as the Linear with the same weight would be.

* bone, mini   y += conv(s, D), where s are the shard sums of x's channels, within each group: a convolution of r instead of
               in_channels / groups channels, which has the frozen one's stride, padding and dilation.
* BAT          the kernel is small beside the feature map: W' is written out, and the frozen convolution made with it.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from bonetune.ops.reference import Update, delta
from bonetune.ops.shards import ShardSums


class FrozenConvolution(Protocol):
    """What an update needs of the convolution it adapts. x (N, in_channels, *size) or without N."""

    @property
    def groups(self) -> int: ...

    def __call__(self, x: Tensor) -> Tensor:
        """The convolution with its bias, in a tensor that may be written to."""
        ...

    def convolved(self, x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
        """The same convolution with another kernel (out_channels, any number of channels / groups, *K)."""
        ...

    def weight(self) -> Tensor:
        """The kernel (out_channels, in_channels / groups, *K)."""
        ...

    @property
    def bias(self) -> Tensor | None: ...

    @property
    def plain(self) -> bool:
        """Whether calling the layer is nothing but the convolution, none of it trained."""
        ...


def adapted_convolution(frozen: FrozenConvolution, x: Tensor, updates: Sequence[Update]) -> Tensor:
    """The convolution of x with W + sum_k scale_k * Delta_k(W), each update to its rows, after its dropout.

    x (N, in_channels, *size) or (in_channels, *size), as torch has it. In the dtype that the frozen layer returns.
    """
    kernel = frozen.weight()
    blockwise = [u for u in updates if u.spec.blockwise]
    if blockwise and frozen.plain and all(u.dropout is None and u.rows is None and not u.exact for u in blockwise):
        changed = kernel + sum(kernel_change(kernel, u) for u in blockwise)
        y = frozen.convolved(x, changed, frozen.bias)
    else:
        y = frozen(x)
        for u in blockwise:
            y = u.added_to(y, frozen.convolved(u.entering(x), kernel_change(kernel, u)))
    channels = x.dim() + 1 - kernel.dim()
    sums = ShardSums(_channels_last(x, channels, frozen.groups))
    for u in updates:
        if u.spec.blockwise:
            continue
        here = sums if u.dropout is None else ShardSums(_channels_last(u.dropout(x), channels, frozen.groups))
        s = u.selected(here[u.spec.r]).movedim((-2, -1), (channels, channels + 1)).flatten(channels, channels + 1)
        y = u.added_to(y, frozen.convolved(s, _shared_kernel(u, kernel)))
    return y


def matrices(kernel: Tensor) -> Tensor:
    """(out, in, *K) as the offsets' matrices (prod(K), out, in); as (out, in) if there is one offset. Views."""
    flat = kernel.flatten(2)
    return flat[..., 0] if flat.shape[2] == 1 else flat.permute(2, 0, 1)


def as_kernel(stack: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `matrices`, for a kernel of that shape."""
    return (stack.unsqueeze(-1) if stack.dim() == 2 else stack.permute(1, 2, 0)).reshape(shape)


def kernel_change(kernel: Tensor, update: Update) -> Tensor:
    """Scale * Delta(W) as a kernel, for any variant."""
    return as_kernel(update.scale * delta(matrices(kernel), update.theta, update.spec), kernel.shape)


def _shared_kernel(update: Update, kernel: Tensor) -> Tensor:
    """Scale * D as a kernel (out, r, *K)."""
    out, _, *sizes = kernel.shape
    D = update.theta if update.theta.dim() == 3 else update.theta.unsqueeze(0)
    return update.scale * D.repeat(1, 1, out // D.shape[2]).permute(2, 1, 0).reshape(out, update.spec.r, *sizes)


def _channels_last(x: Tensor, channels: int, groups: int) -> Tensor:
    """(N, groups * in, *size) as (N, *size, groups, in): a view, whose shards are summed where they lie."""
    return x.unflatten(channels, (groups, -1)).movedim((channels, channels + 1), (-2, -1))
