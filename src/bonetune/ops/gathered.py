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
        scales: their factors.
        index: which of them each row of the batch has; -1 is none.
    """

    spec: ShardSpec
    thetas: list[Tensor]
    scales: list[float]
    index: list[int]

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
    together: dict[tuple[ShardSpec, torch.dtype], list[Gathered]] = {}
    others = []
    for u in updates:
        trained = torch.is_grad_enabled() and (x.requires_grad or u.theta.requires_grad)
        if u.rows is None or u.dropout is not None or trained or not u.theta.is_contiguous():
            others.append(u)
        else:
            _join(together.setdefault((u.spec, u.theta.dtype), []), u, u.rows.numbers, len(x))
    return [gathered for alike in together.values() for gathered in alike], others


def _join(alike: list[Gathered], u: Update, rows: Sequence[int], count: int) -> None:
    """Add an update to the first of these whose updates leave its rows free, or to a new one."""
    gathered = next((g for g in alike if all(g.index[row] < 0 for row in rows)), None)
    if gathered is None:
        gathered = Gathered(u.spec, [], [], [-1] * count)
        alike.append(gathered)
    for row in rows:
        gathered.index[row] = len(gathered.thetas)
    gathered.thetas.append(u.theta)
    gathered.scales.append(float(u.scale))


def _by_row(x: Tensor) -> Tensor:
    """(rows, ..., features) -> (rows, tokens, features)."""
    return rows(x).view(len(x), -1, x.shape[-1])
