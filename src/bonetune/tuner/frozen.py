"""The layer under an adapter, as `bonetune.ops` sees it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

_AT_REST = (nn.Parameter, Tensor)
_NAMES = {"weight", "bias"}


class FrozenBase:
    """The base layer of a tuner layer during one forward: an `ops.FrozenLinear`.

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
            return nn.functional.linear(x, self._base.weight)
        y = self(x)
        return y if self.bias is None else y - self.bias.to(y.dtype)

    def weight(self) -> Tensor:
        if self._bare:
            return self._base._parameters["weight"]  # the Parameter itself: saving it for backward costs nothing
        if self._layer.quantization_backend is None:
            return self._layer.get_base_layer().weight
        return self._layer.get_base_weight()

    @property
    def bias(self) -> Tensor | None:
        return self._base._parameters["bias"] if self._bare else self._layer.bias


def _is_bare(base: nn.Module) -> bool:
    """Whether calling `base` is x W^T + bias and nothing else, so that the product may be computed without calling it.

    Not so for subclasses (quantized, parametrized, of another tuner), for layers with hooks (offloading, recorders,
    DeepSpeed's gathering), and with a DTensor, another tensor subclass or a sparse tensor for a weight.
    """
    if type(base) is not nn.Linear or "forward" in base.__dict__:
        return False
    if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
        return False
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return False
    parameters = base._parameters
    return parameters.keys() == _NAMES and all(
        p is None or (type(p) in _AT_REST and p.layout is torch.strided and not hasattr(p, "ds_id"))
        for p in parameters.values()
    )
