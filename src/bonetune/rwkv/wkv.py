"""The WKV operators as the models call them: in float32, by the way that fits the tokens, the device and the packages there."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from bonetune.rwkv import wkv6, wkv7
from bonetune.rwkv.sequences import Sequences


def wkv(
    version: str, inputs: tuple[Tensor, ...], u: Tensor | None, state: Tensor, sequences: Sequences
) -> tuple[Tensor, Tensor]:
    """RWKV's operator on a row of tokens.

    One token of each sequence is one step of the recurrence; several go by chunks: on a GPU by flash-linear-attention's
    kernels if the package is there (pip install fla-core), else by matrix products of torch's own, as on every other device.

    Args:
        version: x060 or x070.
        inputs: (tokens, heads, n) each: r, k, v, decay of `bonetune.rwkv.wkv6`, or r, k, v, decay, a, b of `wkv7`.
        u: (heads, n), of x060.
        state: (sequences, heads, K, V), before each sequence.
        sequences: where they begin.

    Returns:
        y (tokens, heads, n) and the states after the sequences, both float32, or float64 where an input is.
    """
    operator: Any = wkv6 if version == "x060" else wkv7
    dtype = torch.promote_types(inputs[0].dtype, torch.float32)
    fixed = () if u is None else (u.to(dtype),)
    state = state.to(dtype)
    if set(sequences.lengths) == {1}:
        y, after = operator.recurrence(*(x.to(dtype).unsqueeze(1) for x in inputs), *fixed, state)
        return y.squeeze(1), after
    if inputs[0].device.type == "cuda" and dtype == torch.float32 and has_kernels():
        return by_kernels(version, inputs, *fixed, state, sequences)
    return operator.chunked(*(x.to(dtype) for x in inputs), *fixed, state, sequences)


@cache
def has_kernels() -> bool:
    """Whether flash-linear-attention is installed, and Triton, which it is written in."""
    return find_spec("fla") is not None and find_spec("triton") is not None


def by_kernels(version: str, inputs: tuple[Tensor, ...], *rest: Any) -> tuple[Tensor, Tensor]:
    """`wkv` by flash-linear-attention's kernels, which take the row as a batch of one with boundaries.

    Their states are (K, V), as here, and their decays logarithms.
    """
    *fixed, state, sequences = rest
    r, k, v, decay, *others = (x.unsqueeze(0) for x in inputs)
    settings = {
        "scale": 1.0,  # K^-0.5 is the default of x060's
        "initial_state": state,
        "output_final_state": True,
        "cu_seqlens": sequences.boundaries,
    }
    y, after = _kernel(version)(r, k, v, decay, *others, *fixed, **settings)
    return y.squeeze(0).to(state.dtype), after


def _kernel(version: str) -> Callable[..., Any]:
    """The kernel of a version, with the arguments in our order."""
    operators: Any = import_module(f"fla.ops.rwkv{6 if version == 'x060' else 7}")
    if version == "x060":
        return lambda r, k, v, decay, u, **settings: operators.chunk_rwkv6(r, k, v, decay.float(), u, **settings)
    return lambda r, k, v, decay, a, b, **settings: operators.chunk_rwkv7(r, decay.float(), k, v, a, b, **settings)
