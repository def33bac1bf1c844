"""RWKV-6's two layers of a block. Source: arXiv 2404.05892, and RWKV-LM's x060."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from bonetune.rwkv.configuration import RwkvConfig
from bonetune.rwkv.layers import LayerState, TimeMixing, mixed, vector
from bonetune.rwkv.sequences import Sequences


class TimeMixing6(TimeMixing):
    """What a token takes from those before it, by `bonetune.rwkv.wkv6`, mixed and decayed as the tokens themselves say.

    With x' the token before x and m_i = time_maa_i + tanh((x + (x' - x) time_maa_x) w1_i) w2_i, the inputs are
    x_i = x + (x' - x) m_i for i in w, k, v, r, g, the order in time_maa_w1 and time_maa_w2, and the output is
    output(silu(gate(x_g)) * norm(wkv)).
    """

    def __init__(self, config: RwkvConfig) -> None:
        super().__init__(config)
        width, mix_rank, decay_rank = config.hidden_size, config.ranks["maa"], config.ranks["decay"]
        self.gate = nn.Linear(width, width, bias=False)
        self.time_maa_x = vector(1, 1, width)
        self.time_maa_w, self.time_maa_k, self.time_maa_v = vector(1, 1, width), vector(1, 1, width), vector(1, 1, width)
        self.time_maa_r, self.time_maa_g = vector(1, 1, width), vector(1, 1, width)
        self.time_maa_w1, self.time_maa_w2 = vector(width, 5 * mix_rank), vector(5, mix_rank, width)
        self.time_decay = vector(1, 1, width)
        self.time_decay_w1, self.time_decay_w2 = vector(width, decay_rank), vector(decay_rank, width)
        self.time_faaaa = vector(self.heads, self.n)

    def forward(
        self, x: Tensor, first: Tensor | None, sequences: Sequences, state: LayerState | None
    ) -> tuple[Tensor, None, Tensor]:
        """(tokens, hidden) to the same, nothing for later blocks, and the states after the sequences."""
        change = sequences.shifted(x, None if state is None else state.att) - x
        low = torch.tanh(mixed(x, change, self.time_maa_x) @ self.time_maa_w1.to(x.dtype))
        added = torch.bmm(low.unflatten(-1, (5, -1)).transpose(0, 1), self.time_maa_w2.to(low.dtype))
        mixes = (self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g)
        xw, xk, xv, xr, xg = (
            mixed(x, change, mix.to(x.dtype).flatten(0, 1) + part) for mix, part in zip(mixes, added, strict=True)
        )
        low = torch.tanh(xw @ self.time_decay_w1.to(xw.dtype)) @ self.time_decay_w2.to(xw.dtype)
        wide = torch.promote_types(low.dtype, torch.float32)
        decay = -torch.exp(self.time_decay.to(wide).flatten(0, 1) + low.to(wide))
        inputs = tuple(map(self.by_head, (self.receptance(xr), self.key(xk), self.value(xv), decay)))
        y, after = self.attended(inputs, self.time_faaaa, None if state is None else state.wkv, sequences)
        gate = functional.silu(self.gate(xg))
        return self.output(self.ln_x(y).to(gate.dtype) * gate), None, after


class ChannelMixing6(nn.Module):
    """sigmoid(receptance(x_r)) * value(relu(key(x_k))^2), with x_k and x_r the token with some of the one before it."""

    def __init__(self, config: RwkvConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.time_maa_k, self.time_maa_r = vector(1, 1, width), vector(1, 1, width)
        self.key = nn.Linear(width, inner, bias=False)
        self.receptance = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, sequences: Sequences, state: LayerState | None) -> Tensor:
        change = sequences.shifted(x, None if state is None else state.ffn) - x
        key = functional.relu(self.key(mixed(x, change, self.time_maa_k))).square()
        return torch.sigmoid(self.receptance(mixed(x, change, self.time_maa_r))) * self.value(key)
