"""RWKV-7's two layers of a block. Source: arXiv 2503.14456, and RWKV-LM's x070."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from bonetune.rwkv.configuration import RwkvConfig
from bonetune.rwkv.layers import LayerState, TimeMixing, mixed, vector
from bonetune.rwkv.sequences import Sequences

# The fastest decay's logarithm, exp(-0.5) with its sign.
_LEAST_LOG_DECAY = -math.exp(-0.5)


class TimeMixing7(TimeMixing):
    """What a token takes from those before it, by `bonetune.rwkv.wkv7`.

    With x_i = x + (x' - x) x_i for the token x' before x, and low-rank maps of the tokens for decay (w), rate of rewriting (a),
    share of the first block's values (v) and gate (g):

        decay = -exp(-0.5) sigmoid(w0 + tanh(x_w w1) w2)        a = sigmoid(a0 + x_a a1 a2)
        kk = normalized by head(k * k_k)                         k <- k (1 + (a - 1) k_a)
        v <- v + (v_first - v) sigmoid(v0 + x_v v1 v2)           in all blocks but the first
        y = norm(wkv(r, k, v, decay, -kk, kk * a)) + (sum by head of r k r_k) v

    and the output is output(y * (sigmoid(x_g g1) g2)).
    """

    def __init__(self, config: RwkvConfig, is_first: bool) -> None:
        super().__init__(config)
        width, ranks = config.hidden_size, config.ranks
        self.x_r, self.x_w, self.x_k = vector(1, 1, width), vector(1, 1, width), vector(1, 1, width)
        self.x_v, self.x_a, self.x_g = vector(1, 1, width), vector(1, 1, width), vector(1, 1, width)
        self.w0, self.w1, self.w2 = vector(1, 1, width), vector(width, ranks["w"]), vector(ranks["w"], width)
        self.a0, self.a1, self.a2 = vector(1, 1, width), vector(width, ranks["a"]), vector(ranks["a"], width)
        if not is_first or config.unused_in_first:
            self.v0, self.v1, self.v2 = vector(1, 1, width), vector(width, ranks["v"]), vector(ranks["v"], width)
        self.g1, self.g2 = vector(width, ranks["g"]), vector(ranks["g"], width)
        self.k_k, self.k_a = vector(1, 1, width), vector(1, 1, width)
        self.r_k = vector(self.heads, self.n)

    def forward(
        self, x: Tensor, first: Tensor | None, sequences: Sequences, state: LayerState | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens, hidden) to the same, the first block's values, and the states after the sequences."""
        change = sequences.shifted(x, None if state is None else state.att) - x
        mixes = (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)
        xr, xw, xk, xv, xa, xg = (mixed(x, change, mix) for mix in mixes)
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        wide = torch.promote_types(x.dtype, torch.float32)
        low = torch.tanh(xw @ self.w1.to(x.dtype)) @ self.w2.to(x.dtype)
        decay = _LEAST_LOG_DECAY * torch.sigmoid(self.w0.to(wide).flatten(0, 1) + low.to(wide))
        a = torch.sigmoid(_low_rank(xa, self.a0, self.a1, self.a2))
        gate = torch.sigmoid(xg @ self.g1.to(x.dtype)) @ self.g2.to(x.dtype)
        kk = functional.normalize(self.by_head(k * self.k_k.to(k.dtype).flatten(0, 1)), dim=-1)
        k = k * (1 + (a - 1) * self.k_a.to(k.dtype).flatten(0, 1))
        if first is not None:
            v = v + (first - v) * torch.sigmoid(_low_rank(xv, self.v0, self.v1, self.v2))
        r, k, v, decay, a = map(self.by_head, (r, k, v, decay, a))
        y, after = self.attended((r, k, v, decay, -kk, kk * a), None, None if state is None else state.wkv, sequences)
        own = (r * k * self.r_k.to(r.dtype)).sum(-1, keepdim=True) * v
        y = self.ln_x(y).to(gate.dtype) + own.flatten(1).to(gate.dtype)
        return self.output(y * gate), v.flatten(1) if first is None else first, after


def _low_rank(x: Tensor, shift: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """shift + x down up: (tokens, hidden) to the same."""
    return shift.to(x.dtype).flatten(0, 1) + (x @ down.to(x.dtype)) @ up.to(x.dtype)


class ChannelMixing7(nn.Module):
    """value(relu(key(x_k))^2), with x_k the token with some of the one before it."""

    def __init__(self, config: RwkvConfig) -> None:
        super().__init__()
        self.x_k = vector(1, 1, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.value = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, sequences: Sequences, state: LayerState | None) -> Tensor:
        change = sequences.shifted(x, None if state is None else state.ffn) - x
        return self.value(functional.relu(self.key(mixed(x, change, self.x_k))).square())
