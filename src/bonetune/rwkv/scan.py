"""States from chunk to chunk: what is sequential in a chunked recurrence, and nothing else."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bonetune.rwkv.sequences import turns


def scan(transitions: Tensor, additions: Tensor, states: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """S_{c+1} = T_c S_c + D_c along the chunks of each sequence.

    Args:
        transitions: T, (chunks, heads, K, K); or its diagonal, (chunks, heads, K).
        additions: D, (chunks, heads, K, V).
        states: (sequences, heads, K, V), before each sequence's first chunk.
        counts: chunks of each sequence, which lie one sequence after the other.

    Returns:
        the state before each chunk, (chunks, heads, K, V), and after each sequence, (sequences, heads, K, V).
    """
    before, after = _Scan.apply(transitions, additions, states, tuple(counts))  # pyright: ignore[reportGeneralTypeIssues]  (of any autograd.Function)
    return before, after


def _times(T: Tensor, S: Tensor) -> Tensor:
    return T.unsqueeze(-1) * S if T.dim() == 3 else T @ S


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, T: Tensor, D: Tensor, states: Tensor, counts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        ctx.counts = counts
        before, after = torch.empty_like(D), states.clone()
        for members, chunks in turns(counts):
            now = after[members]
            before[chunks] = now
            after[members] = _times(T[chunks], now) + D[chunks]
        ctx.save_for_backward(T, before)
        return before, after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_before: Tensor, d_after: Tensor) -> tuple[Tensor | None, ...]:
        T, before = ctx.saved_tensors
        d_states, dD = d_after.clone(), torch.empty_like(before)
        adjoint = T if T.dim() == 3 else T.mT
        for members, chunks in reversed(turns(ctx.counts)):
            following = d_states[members]
            dD[chunks] = following
            d_states[members] = d_before[chunks] + _times(adjoint[chunks], following)
        dT = (dD * before).sum(-1) if T.dim() == 3 else dD @ before.mT
        return dT, dD, d_states, None
