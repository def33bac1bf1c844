"""Batches of which each row has its own adapter: the adapters of one kind together, each row with its own matrices.

What `bonetune.ops.fast` computes adapter by adapter where there is no kernel for it, or where gradients are wanted.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bonetune.ops import operators
from bonetune.ops.reference import Update
from bonetune.ops.shards import rows
from bonetune.spec import ShardSpec


class Gathered(NamedTuple):
    """Updates of one kind, each for rows of its own.

    Args:
        spec: of all.
        thetas: their trainable tensors.
        scales: their factors (adapters,), float32.
        index: which of them each row has, int32 (rows,); -1 is none.
    """

    spec: ShardSpec
    thetas: list[Tensor]
    scales: Tensor
    index: Tensor

    def added_to(self, y: Tensor, change: Tensor) -> Tensor:
        """Y + change, a new tensor in y's dtype."""
        return y + change.to(y.dtype)

    def shared(self, s: Tensor) -> Tensor:
        """scale * s D of bone and mini, each row's: s (rows, ..., r) -> (rows, ..., out or mini_r)."""
        p = operators.gathered_product(_by_row(s), self.thetas, self.index, self.scales)
        return p.view(*s.shape[:-1], p.shape[-1])

    def blocks(self, v: Tensor, tile: Tensor | None, transposed: bool) -> tuple[Tensor, Tensor]:
        """(p, sum_b p_b) with p_b = scale * (v_b + tile) B[b], or B[b]^T if `transposed`: v (rows, ..., m * r)."""
        tiles = None if tile is None else _by_row(tile)
        p, sums = operators.gathered_block_product(_by_row(v), self.thetas, self.index, self.scales, tiles, transposed)
        return p.view(v.shape), sums.view(*v.shape[:-1], sums.shape[-1])


def gather(updates: Sequence[Update], x: Tensor, kernels: bool) -> tuple[list[Gathered], list[Update]]:
    """The updates that can be computed together, and the others: those of all rows, with dropout, or to be trained."""
    if not kernels:
        return [], list(updates)
    together: dict[tuple[ShardSpec, torch.dtype], list[Update]] = {}
    others = []
    for u in updates:
        trained = torch.is_grad_enabled() and (x.requires_grad or u.theta.requires_grad)
        if u.rows is None or u.dropout is not None or trained or not u.theta.is_contiguous():
            others.append(u)
        else:
            together.setdefault((u.spec, u.theta.dtype), []).append(u)
    return [_gathered(spec, alike, x) for (spec, _), alike in together.items()], others


def _gathered(spec: ShardSpec, updates: list[Update], x: Tensor) -> Gathered:
    index = torch.full((len(x),), -1, dtype=torch.int32, device=x.device)
    for number, u in enumerate(updates):
        assert u.rows is not None
        index[u.rows] = number
    scales = torch.tensor([u.scale for u in updates], dtype=torch.float32).to(x.device, non_blocking=True)
    return Gathered(spec, [u.theta for u in updates], scales, index)


def _by_row(x: Tensor) -> Tensor:
    """(rows, ..., features) -> (rows, tokens, features)."""
    return rows(x).view(len(x), -1, x.shape[-1])
