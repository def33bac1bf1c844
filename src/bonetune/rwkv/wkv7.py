"""RWKV-7's operator: a state that decays, is rewritten where a key points (a generalized delta rule), and takes up a product.

With S (K, V), zero or carried at first, and for each token t and head:

    S_t = diag(exp(decay_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T
    y_t = r_t^T S_t

Source: arXiv 2503.14456 (Goose), section 3; the paper and its files write the transpose of this state.
"""

import torch
from torch import Tensor

from bonetune.rwkv.scan import scan
from bonetune.rwkv.sequences import Sequences

CHUNK = 32


def recurrence(r: Tensor, k: Tensor, v: Tensor, decay: Tensor, a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The equations, token by token, of sequences of one length.

    Args:
        r, k, v, decay, a, b: (sequences, tokens, heads, n); decay is a logarithm, at most 0.
        state: (sequences, heads, K, V).

    Returns:
        y, as r; and the state after the last token.
    """
    outputs = []
    tokens = (x.unbind(1) for x in (r, k, v, decay.exp(), a, b))
    for r_t, k_t, v_t, w_t, a_t, b_t in zip(*tokens, strict=True):
        rewritten = b_t.unsqueeze(-1) * (a_t.unsqueeze(-2) @ state)
        state = w_t.unsqueeze(-1) * state + rewritten + k_t.unsqueeze(-1) * v_t.unsqueeze(-2)
        outputs.append((r_t.unsqueeze(-2) @ state).squeeze(-2))
    return torch.stack(outputs, 1), state


def chunked(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    sequences: Sequences,
    size: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """The same by chunks, in products of matrices, differentiable in everything.

    Within a chunk, with g the cumulative sum of the decay and e the sum up to the token before, let r' = r exp(g),
    a' = a exp(e), k' = k exp(-g), b' = b exp(-g). Then u_t = a_t^T S_{t-1} solves (I - tril_{-1}(a' b'^T)) U =
    tril_{-1}(a' k'^T) V + a' S, and y = tril(r' k'^T) V + tril(r' b'^T) U + r' S. U is linear in S, and so is the state after
    the chunk: U = U0 + M S is solved for all chunks at once, and from chunk to chunk there is one product of matrices.

    exp(-g) has to be finite: the decay's sum over a chunk should stay above -80. RWKV-7's is above -0.61 a token.

    Args:
        r, k, v, decay, a, b: (tokens, heads, n), of all sequences one after the other.
        state: (sequences, heads, K, V).
        sequences: where they begin.
        size: tokens of a chunk.

    Returns:
        y, as r; and the state after each sequence.
    """
    r, k, v, decay, a, b = (sequences.cut(x, size) for x in (r, k, v, decay, a, b))
    g = decay.cumsum(-2)
    e = torch.nn.functional.pad(g[..., :-1, :], (0, 0, 1, 0))
    grown, last = (-g).exp(), g[..., -1:, :]
    r, a, k, b = r * g.exp(), a * e.exp(), k * grown, b * grown
    rewriting = torch.eye(size, dtype=a.dtype, device=a.device) - (a @ b.mT).tril(-1)
    known = torch.cat([(a @ k.mT).tril(-1) @ v, a], -1)
    solved = torch.linalg.solve_triangular(rewriting, known, upper=False, unitriangular=True)
    U0, M = solved.split([v.shape[-1], a.shape[-1]], -1)
    rb = (r @ b.mT).tril()
    decayed = last.exp()
    to_end = torch.cat([k, b], -2) * decayed
    k_end, b_end = to_end.split(size, -2)
    transitions = torch.diag_embed(decayed.squeeze(-2)) + b_end.mT @ M
    additions = k_end.mT @ v + b_end.mT @ U0
    before, after = scan(transitions, additions, state, sequences.chunk_counts(size))
    y = (r @ k.mT).tril() @ v + rb @ U0 + (r + rb @ M) @ before
    return sequences.joined(y), after
