"""What both versions' layers are made of. Attributes are named as in RWKV's files, so that a state_dict is a file."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from bonetune.rwkv.configuration import RwkvConfig
from bonetune.rwkv.sequences import Sequences
from bonetune.rwkv.wkv import wkv

# RWKV-LM's: 1e-5 times 8 squared.
_HEADS_EPSILON = 64e-5


@dataclass
class LayerState:
    """What one block carries from one token to the next.

    Args:
        att: (sequences, hidden), what the time mixing saw last.
        wkv: (sequences, heads, K, V), float32.
        ffn: (sequences, hidden), what the channel mixing saw last.
    """

    att: Tensor
    wkv: Tensor
    ffn: Tensor


class LayerNorm(nn.LayerNorm):
    """A layer norm that computes in float32 and may have another dtype than what it normalizes."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch's name)
        wide = torch.promote_types(input.dtype, torch.float32)
        scale, shift = self.weight.to(wide), self.bias.to(wide)
        return functional.layer_norm(input.to(wide), self.normalized_shape, scale, shift, self.eps).to(input.dtype)


class HeadsNorm(nn.Module):
    """The norm of each head's output: a group norm, (tokens, heads, n) to (tokens, hidden), float32."""

    def __init__(self, heads: int, features: int) -> None:
        super().__init__()
        self.heads = heads
        self.weight, self.bias = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))

    def forward(self, y: Tensor) -> Tensor:
        scale, shift = self.weight.to(y.dtype), self.bias.to(y.dtype)
        return functional.group_norm(y.flatten(1), self.heads, scale, shift, _HEADS_EPSILON)


class TimeMixing(nn.Module):
    """What both versions' time mixing has: the projections, the norm of the heads, and the operator with its state."""

    def __init__(self, config: RwkvConfig) -> None:
        super().__init__()
        self.version, self.heads, self.n = config.version, config.num_heads, config.head_size
        width = config.hidden_size
        self.receptance = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.ln_x = HeadsNorm(self.heads, width)
        self.time_state: nn.Parameter | None
        self.register_parameter("time_state", vector(self.heads, self.n, self.n) if config.initial_state else None)

    def by_head(self, x: Tensor) -> Tensor:
        """(tokens, hidden) to (tokens, heads, n)."""
        return x.unflatten(-1, (self.heads, self.n))

    def first_state(self, sequences: Sequences, like: Tensor) -> Tensor:
        """The state that sequences begin with: zeros, or the trained one, which is stored as (heads, V, K)."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        if self.time_state is None:
            return torch.zeros(len(sequences.lengths), self.heads, self.n, self.n, dtype=dtype, device=like.device)
        return self.time_state.to(dtype).mT.expand(len(sequences.lengths), -1, -1, -1)

    @torch.compiler.disable()
    def attended(
        self, inputs: tuple[Tensor, ...], u: Tensor | None, state: Tensor | None, sequences: Sequences
    ) -> tuple[Tensor, Tensor]:
        """`wkv`, from the first state if there is none; not in autocast, which would round its products."""
        with torch.autocast(inputs[0].device.type, enabled=False):
            return wkv(self.version, inputs, u, self.first_state(sequences, inputs[0]) if state is None else state, sequences)


def vector(*shape: int) -> nn.Parameter:
    """A parameter of its own, of zeros."""
    return nn.Parameter(torch.zeros(shape))


def mixed(x: Tensor, change: Tensor, mix: Tensor) -> Tensor:
    """x + change * mix, in the dtype of x: a token with some of the one before it. mix is (1, 1, hidden), or as x."""
    return x + change * mix.to(x.dtype).flatten(0, -2)
