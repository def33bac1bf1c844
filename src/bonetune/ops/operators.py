"""The Triton kernels as operators of torch, each with what a compiler must know of it: torch.compile and autocast keep them.

Importing this needs no Triton; calling does. Products accumulate in float32 and round once. Kernels take matrices row by row
without gaps, and launch on the current device: here both are seen to, whatever a compiler or several GPUs make of them.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import overload

import torch
from torch import Tensor

_NAMESPACE = "bonetune"
# Tables of the adapters of a batch are made where they are first needed, which a recorded graph would not see.
_MAKES_TABLES = [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []


def _device(x: Tensor) -> AbstractContextManager[object]:
    """Within it, x's GPU is the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@overload
def _whole(x: Tensor) -> Tensor: ...
@overload
def _whole(x: Tensor | None) -> Tensor | None: ...
def _whole(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


@torch.library.custom_op(f"{_NAMESPACE}::shard_sum", mutates_args=())
def shard_sum(x: Tensor, r: int) -> Tensor:
    """s = sum_b x_b (n, r) of x (n, features), summed in float32."""
    from bonetune.ops.kernels import shards

    with _device(x):
        return shards.shard_sum(_whole(x), r)


@shard_sum.register_fake
def _(x: Tensor, r: int) -> Tensor:
    return x.new_empty(x.shape[0], r)


@torch.library.custom_op(f"{_NAMESPACE}::shard_add_", mutates_args=("y",))
def shard_add_(y: Tensor, t: Tensor) -> None:
    """y_b += t in place. y (n, features), t (n, r)."""
    from bonetune.ops.kernels import shards

    whole = _whole(y)
    with _device(y):
        shards.shard_add_(whole, _whole(t))
    if whole is not y:
        y.copy_(whole)


@torch.library.custom_op(f"{_NAMESPACE}::block_product", mutates_args=())
def block_product(
    v: Tensor, blocks: Tensor, scale: float, tile: Tensor | None, plus: Tensor | None, summed: bool
) -> tuple[Tensor, Tensor]:
    """(p + plus, sum_b p_b) with p_b = scale * (v_b + tile) M[b]; the sums (0, r) unless `summed`."""
    from bonetune.ops.kernels import blocks as kernels

    with _device(v):
        return kernels.block_product(_whole(v), blocks, scale, _whole(tile), _whole(plus), summed)


@block_product.register_fake
def _(v: Tensor, blocks: Tensor, scale: float, tile: Tensor | None, plus: Tensor | None, summed: bool) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), v.new_empty(v.shape[0] if summed else 0, blocks.shape[-1])


@torch.library.custom_op(f"{_NAMESPACE}::block_backward", mutates_args=())
def block_backward(
    v: Tensor,
    blocks: Tensor,
    scale: float,
    dp: Tensor,
    v_tile: Tensor | None,
    dp_tile: Tensor | None,
    plus: Tensor | None,
    needs_v: bool,
) -> tuple[Tensor, Tensor]:
    """(dv + plus, dM) with g_b = dp_b + dp_tile, dv_b = scale * g_b M[b]^T, dM[b] = scale * (v_b + v_tile)^T g_b in float32.

    The first is empty unless `needs_v`.
    """
    from bonetune.ops.kernels import blocks as kernels

    with _device(dp):
        return kernels.block_backward(
            _whole(v), blocks, scale, _whole(dp), _whole(v_tile), _whole(dp_tile), _whole(plus), needs_v
        )


@block_backward.register_fake
def _(
    v: Tensor,
    blocks: Tensor,
    scale: float,
    dp: Tensor,
    v_tile: Tensor | None,
    dp_tile: Tensor | None,
    plus: Tensor | None,
    needs_v: bool,
) -> tuple[Tensor, Tensor]:
    total = dp.new_empty(dp.shape if needs_v else 0)
    return total, dp.new_empty(blocks.shape, dtype=torch.float32)


@torch.library.custom_op(f"{_NAMESPACE}::bat_weight", mutates_args=())
def bat_weight(W: Tensor, B: Tensor, scale: float, plus: Tensor | None) -> Tensor:
    """scale * (W[a,b] B[a] + B[a]) + plus (out, in), in W's dtype."""
    from bonetune.ops.kernels import column

    with _device(W):
        return column.weight(_whole(W), B, scale, _whole(plus))


@bat_weight.register_fake
def _(W: Tensor, B: Tensor, scale: float, plus: Tensor | None) -> Tensor:
    return W.new_empty(W.shape)


@torch.library.custom_op(f"{_NAMESPACE}::bat_product", mutates_args=())
def bat_product(x: Tensor, W: Tensor, B: Tensor, bias: Tensor | None, scale: float, with_weight: bool) -> Tensor:
    """x W'^T + bias (n, out), W' transformed tile by tile: for few rows. Without W itself unless `with_weight`."""
    from bonetune.ops.kernels import column

    with _device(x):
        return column.product(_whole(x), _whole(W), B, _whole(bias), scale, with_weight)


@bat_product.register_fake
def _(x: Tensor, W: Tensor, B: Tensor, bias: Tensor | None, scale: float, with_weight: bool) -> Tensor:
    return x.new_empty(x.shape[0], W.shape[0])


@torch.library.custom_op(f"{_NAMESPACE}::bat_product_backward", mutates_args=())
def bat_product_backward(dy: Tensor, W: Tensor, B: Tensor, scale: float, with_weight: bool) -> Tensor:
    """dy W' (n, in), W' transformed tile by tile: for few rows."""
    from bonetune.ops.kernels import column

    with _device(dy):
        return column.product_backward(_whole(dy), _whole(W), B, scale, with_weight)


@bat_product_backward.register_fake
def _(dy: Tensor, W: Tensor, B: Tensor, scale: float, with_weight: bool) -> Tensor:
    return dy.new_empty(dy.shape[0], W.shape[1])


@torch.library.custom_op(f"{_NAMESPACE}::bat_gradient", mutates_args=())
def bat_gradient(x: Tensor, dy: Tensor, W: Tensor, r: int, scale: float) -> Tensor:
    """dB[a] = scale * sum_b (I + W[a,b]^T) dy_a^T x_b (out / r, r, r) in float32."""
    from bonetune.ops.kernels import column

    with _device(x):
        return column.gradient(_whole(x), _whole(dy), _whole(W), r, scale)


@bat_gradient.register_fake
def _(x: Tensor, dy: Tensor, W: Tensor, r: int, scale: float) -> Tensor:
    return x.new_empty(W.shape[0] // r, r, r, dtype=torch.float32)


@torch.library.custom_op(
    f"{_NAMESPACE}::gathered_product",
    mutates_args=(),
    schema="(Tensor v, Tensor[] matrices, int[] index, float[] scales) -> Tensor",  # torch 2.6 infers none of Sequence
    tags=_MAKES_TABLES,
)
def gathered_product(v: Tensor, matrices: Sequence[Tensor], index: Sequence[int], scales: Sequence[float]) -> Tensor:
    """p_i = scale[k] * v_i M_k with k = index[i] (rows, tokens, l); zeros where k is -1. v (rows, tokens, r), M_k (r, l)."""
    from bonetune.ops.kernels import gathered

    with _device(v):
        return gathered.product(_whole(v), [_whole(m) for m in matrices], index, scales)


@gathered_product.register_fake
def _(v: Tensor, matrices: Sequence[Tensor], index: Sequence[int], scales: Sequence[float]) -> Tensor:
    return v.new_empty(*v.shape[:2], matrices[0].shape[1])


@torch.library.custom_op(
    f"{_NAMESPACE}::gathered_block_product",
    mutates_args=(),
    schema="(Tensor v, Tensor[] blocks, int[] index, float[] scales, Tensor? tile, bool transposed) -> (Tensor, Tensor)",
    tags=_MAKES_TABLES,
)
def gathered_block_product(
    v: Tensor, blocks: Sequence[Tensor], index: Sequence[int], scales: Sequence[float], tile: Tensor | None, transposed: bool
) -> tuple[Tensor, Tensor]:
    """(p, sum_b p_b) with p_ib = scale[k] * (v_ib + tile_i) M_k[b], k = index[i]; zeros where k is -1."""
    from bonetune.ops.kernels import gathered

    with _device(v):
        return gathered.block_product(_whole(v), [_whole(b) for b in blocks], index, scales, _whole(tile), transposed)


@gathered_block_product.register_fake
def _(
    v: Tensor, blocks: Sequence[Tensor], index: Sequence[int], scales: Sequence[float], tile: Tensor | None, transposed: bool
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), v.new_empty(*v.shape[:2], blocks[0].shape[-1])
