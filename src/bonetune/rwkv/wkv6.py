"""RWKV-6's operator: an outer product is added to a state that decays channel by channel, at a rate that depends on the data.

With S (K, V), zero or carried at first, and for each token t and head:

    y_t = r_t^T (S_{t-1} + diag(u) k_t v_t^T)
    S_t = diag(exp(decay_t)) S_{t-1} + k_t v_t^T

Source: arXiv 2404.05892 (Eagle and Finch), section 4.2.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bonetune.rwkv.scan import scan
from bonetune.rwkv.sequences import Sequences

CHUNK = 16
# Of the exponentials of a group of chunks, which exist only while the group is computed.
_GROUP_BYTES = 1 << 23


def recurrence(r: Tensor, k: Tensor, v: Tensor, decay: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The equations, token by token, of sequences of one length.

    Args:
        r, k, v, decay: (sequences, tokens, heads, n); decay is a logarithm, at most 0.
        u: (heads, n).
        state: (sequences, heads, K, V).

    Returns:
        y, as r; and the state after the last token.
    """
    outputs = []
    for r_t, k_t, v_t, w_t in zip(r.unbind(1), k.unbind(1), v.unbind(1), decay.exp().unbind(1), strict=True):
        kv = k_t.unsqueeze(-1) * v_t.unsqueeze(-2)
        outputs.append((r_t.unsqueeze(-2) @ (state + u.unsqueeze(-1) * kv)).squeeze(-2))
        state = w_t.unsqueeze(-1) * state + kv
    return torch.stack(outputs, 1), state


def chunked(
    r: Tensor, k: Tensor, v: Tensor, decay: Tensor, u: Tensor, state: Tensor, sequences: Sequences, size: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """The same by chunks, in products of matrices, differentiable in everything.

    Within a chunk, with g the cumulative sum of the decay and e the sum up to the token before:
    A[t, j] = sum_n r[t, n] k[j, n] exp(e[t, n] - g[j, n]) for j < t, sum_n r u k at j = t, and
    y = A v + (r exp(e)) S, S <- diag(exp(g_last)) S + (k exp(g_last - g))^T v. No exponent is above 0, so any decay is safe. A
    decay that leaves less than a hundredth of the last digit is taken to leave that: else its size would cost the sums g those
    digits that tell the following tokens' decays.

    Args:
        r, k, v, decay: (tokens, heads, n), of all sequences one after the other.
        u: (heads, n).
        state: (sequences, heads, K, V).
        sequences: where they begin.
        size: tokens of a chunk.

    Returns:
        y, as r; and the state after each sequence.
    """
    diagonal = (r * u * k).sum(-1, keepdim=True) * v
    decay = decay.clamp(min=math.log(torch.finfo(decay.dtype).eps / 100))
    r, k, v, decay = (sequences.cut(x, size) for x in (r, k, v, decay))
    g = decay.cumsum(-2)
    e = torch.nn.functional.pad(g[..., :-1, :], (0, 0, 1, 0))
    last = g[..., -1:, :]
    before, after = scan(last.squeeze(-2).exp(), (k * (last - g).exp()).mT @ v, state, sequences.chunk_counts(size))
    y = _decayed_products(r, k, e, g) @ v + (r * e.exp()) @ before
    return sequences.joined(y) + diagonal, after


def _decayed_products(r: Tensor, k: Tensor, e: Tensor, g: Tensor) -> Tensor:
    """A[t, j] = sum_n r[t, n] k[j, n] exp(e[t, n] - g[j, n]) for j < t, else 0: (..., size, n) to (..., size, size)."""
    size = r.shape[-2]
    A: Tensor = _DecayedProducts.apply(*(x.reshape(-1, size, x.shape[-1]) for x in (r, k, e, g)))  # pyright: ignore[reportAssignmentType]
    return A.view(*r.shape[:-1], size)


class _DecayedProducts(torch.autograd.Function):
    """The exponentials are made anew in backward: they are n times as large as the result."""

    @staticmethod
    def forward(ctx: Any, r: Tensor, k: Tensor, e: Tensor, g: Tensor) -> Tensor:
        ctx.save_for_backward(r, k, e, g)
        parts = [
            ((_exponentials(e_, g_) * k_.unsqueeze(1)) @ r_.unsqueeze(-1)).squeeze(-1) for r_, k_, e_, g_ in _groups(r, k, e, g)
        ]
        return torch.cat(parts).tril(-1) if parts else r.new_zeros(len(r), r.shape[1], r.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dA: Tensor) -> tuple[Tensor, ...]:
        r, k, e, g = ctx.saved_tensors
        dr, dk = torch.empty_like(r), torch.empty_like(k)
        for dA_, r_, k_, e_, g_, dr_, dk_ in _groups(dA.tril(-1), r, k, e, g, dr, dk):
            P = _exponentials(e_, g_)
            torch.sum(P * dA_.unsqueeze(-1) * r_.unsqueeze(2), 1, out=dk_)
            dr_.copy_((dA_.unsqueeze(2) @ P.mul_(k_.unsqueeze(1))).squeeze(2))
        return dr, dk, r * dr, -k * dk


def _exponentials(e: Tensor, g: Tensor) -> Tensor:
    """exp(e[t] - g[j]) for j < t; what is above the diagonal is not used, and kept finite."""
    return (e.unsqueeze(2) - g.unsqueeze(1)).clamp_(max=0).exp_()


def _groups(*tensors: Tensor) -> Any:
    chunks, size, n = tensors[1].shape
    group = max(1, _GROUP_BYTES // (size * size * n * tensors[1].element_size()))
    return zip(*(tensor.split(group) for tensor in tensors), strict=True) if chunks else iter(())
