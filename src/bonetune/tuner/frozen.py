"""The layer under an adapter, as `bonetune.ops` sees it."""

from typing import Any

import torch
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.modules import module as torch_module
from transformers.pytorch_utils import Conv1D

from bonetune.tuner.held import whole

_AT_REST = (nn.Parameter, Tensor, FakeTensor)
_NAMES = {"weight", "bias"}
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BARE = {nn.Linear, Conv1D, *CONVOLUTIONS}


class FrozenBase:
    """The base layer of a tuner layer during one forward: an `ops.FrozenLinear`, for a Linear or a `Conv1D` of transformers.

    Args:
        layer: the tuner layer.
        args, kwargs: what it was called with besides x; the base layer is called with them.
    """

    __slots__ = ("_bare", "_base", "_called_with", "_layer", "plain")

    def __init__(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        base = layer._modules["base_layer"]
        self._layer, self._base, self._called_with = layer, base, (args, kwargs)
        self._bare = not args and not kwargs and _is_bare(base)
        self.plain = self._bare and not any(p is not None and p.requires_grad for p in base._parameters.values())

    def __call__(self, x: Tensor) -> Tensor:
        args, kwargs = self._called_with
        y = self._base(x, *args, **kwargs)
        # a hook or a kernel may hold on to what it returned; what a plain product returned is nobody else's
        return y if self._bare else y.clone(memory_format=torch.contiguous_format)

    def product(self, x: Tensor) -> Tensor:
        if self._bare:
            return nn.functional.linear(x, self.weight())
        y = self(x)
        return y if self.bias is None else y - self.bias.to(y.dtype)

    def weight(self) -> Tensor:
        # of a bare layer the Parameter itself, or a view of it: saving it for backward costs nothing
        weight = self._base._parameters["weight"] if self._bare else base_weight(self._layer)
        return weight.T if isinstance(self._layer.get_base_layer(), Conv1D) else weight

    @property
    def stored(self) -> bool:
        return _is_at_rest(self._layer.get_base_layer()._parameters.get("weight"))

    @property
    def bias(self) -> Tensor | None:
        return self._base._parameters["bias"] if self._bare else whole(self._layer.get_base_layer(), "bias", self._layer.bias)


class FrozenConv(FrozenBase):
    """The base layer of a `BoneConv` during one forward: an `ops.convolution.FrozenConvolution`."""

    __slots__ = ()

    def convolved(self, x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._layer.get_base_layer()._conv_forward(x, kernel.to(x.dtype), bias)

    @property
    def groups(self) -> int:
        return self._layer.get_base_layer().groups


def base_weight(layer: Any, name: str = "weight") -> Tensor:
    """The weight under a tuner layer: dequantized, gathered from its shards, or fetched from where it was offloaded to."""
    if getattr(layer, "quantization_backend", None) is not None:
        return layer.get_base_weight()
    base = layer.get_base_layer()
    weight = getattr(base, name)
    if hasattr(weight, "ds_id"):
        with gather_params_ctx(weight):
            return weight.detach().clone()
    return whole(base, name, weight)


def _is_bare(base: nn.Module) -> bool:
    """Whether calling `base` is its product and bias and nothing else, so that it may be computed without calling it.

    Not so for subclasses (quantized, parametrized, of another tuner), for layers with hooks (offloading, recorders,
    DeepSpeed's gathering), and with a DTensor, another tensor subclass or a sparse tensor for a weight.
    """
    if type(base) not in _BARE or "forward" in base.__dict__:
        return False
    if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
        return False
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return False
    parameters = base._parameters
    return parameters.keys() == _NAMES and all(p is None or _is_at_rest(p) for p in parameters.values())


def _is_at_rest(tensor: Any) -> bool:
    """Whether a tensor's values lie in it: not quantized, sharded, offloaded or sparse."""
    return (
        type(tensor) in _AT_REST
        and tensor.layout is torch.strided
        and tensor.device.type != "meta"
        and not hasattr(tensor, "ds_id")
    )
