"""Adapted parameters that no Linear holds: the stacked weights of a mixture's experts, mostly."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bonetune.errors import InputError, TargetError
from bonetune.ops import delta
from bonetune.tuner.layer import BoneLayer, name_without_adapters


class ParamWrapper(BoneLayer):
    """A module of which one parameter has adapters of the Bone family; PEFT looks for wrappers by this class name.

    A parameter (E, out, in) holds E matrices, each adapted as a Linear's weight is, by a tensor of its own; (out, in) holds
    one. A module that says `is_transposed`, as transformers' experts do, stores (E, in, out). Which rows of x meet which
    expert is the module's affair, so the update cannot be factored out of W': it is written out at each forward, as PEFT's LoRA
    does it, and neither dropout nor a batch of several adapters is possible.

    Args:
        base_layer: the module, or the wrapper of another of its parameters.
        parameter_name: the parameter's name in the module.
        kwargs: what PEFT's `get_quantization_kwargs` found.

    Raises:
        TargetError: the parameter has neither two nor three dimensions.
    """

    def __init__(self, base_layer: nn.Module, parameter_name: str, **kwargs: Any) -> None:
        super().__init__(base_layer, parameter_name, **kwargs)
        self._transposed = _is_transposed(self.get_base_layer())

    @classmethod
    def sides(cls, module: nn.Module, name: str = "weight") -> tuple[int, int]:
        shape = getattr(module, name).shape
        if len(shape) not in (2, 3):
            raise TargetError(
                f"Parameter {name} of {type(module).__name__} has shape {tuple(shape)}: only (out, in) and (number, out, in) "
                "can be adapted. Train the module whole through `modules_to_save`."
            )
        return (int(shape[-1]), int(shape[-2])) if _is_transposed(module) else (int(shape[-2]), int(shape[-1]))

    @property
    def parameter_name(self) -> str:
        """The adapted parameter's name, under the name by which PEFT asks for it."""
        return self.weight_name

    @property
    def number_of_matrices(self) -> int | None:
        parameter = getattr(self.get_base_layer(), self.weight_name)
        return len(parameter) if parameter.dim() == 3 else None

    def __getattr__(self, name: str) -> Any:
        """What is not the wrapper's is the module's: its owner may read settings from it."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def pattern_name(self, module_name: str) -> str:
        return f"{name_without_adapters(module_name)}.{self.weight_name}"

    def matrices(self, stored: Tensor) -> Tensor:
        return stored.mT if self._transposed else stored

    def as_stored(self, matrices: Tensor) -> Tensor:
        return matrices.mT if self._transposed else matrices

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """What the module returns with the updated parameter."""
        if adapter_names is not None and not self.disable_adapters:
            self._refuse_rows_while_merged()
        if adapter_names is not None and any(name in self.bone_block for name in adapter_names):
            raise ValueError(
                f"Rows of one batch cannot have different adapters on a parameter ({self.parameter_name}): run each adapter's "
                "rows in a batch of their own."
            )
        if self.disable_adapters:
            self._unmerge_disabled()
        updates = (
            [] if adapter_names is not None or self.disable_adapters or self.merged else self.updates(self.active_adapters)
        )
        if not updates:
            return self.base_layer(*args, **kwargs)
        stored = getattr(self.get_base_layer(), self.weight_name)
        if stored.is_meta and not updates[0].theta.is_meta:
            raise InputError(
                f"Parameter {self.parameter_name} is offloaded, and its module fetches it when it is called: an adapter on it "
                "needs it in memory. Merge the adapter, or leave the module out of the offloading."
            )
        W = self.matrices(stored)
        updated = W + sum(u.scale * delta(W, u.theta.to(W.dtype), u.spec) for u in updates)
        return torch.func.functional_call(self.base_layer, {self._path: self.as_stored(updated)}, args, kwargs)

    @property
    def _path(self) -> str:
        """The parameter's name, seen from `base_layer`, in which wrappers of other parameters may be nested."""
        path, module = self.weight_name, self.base_layer
        while isinstance(module, ParamWrapper):
            path, module = f"base_layer.{path}", module.base_layer
        return path

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> nn.Module:
        """The module without this wrapper and those nested in it; PEFT calls it for `unload` and `merge_and_unload`."""
        layer: nn.Module = self
        while isinstance(layer, ParamWrapper):
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            layer = layer.base_layer
        return layer


def _is_transposed(module: nn.Module) -> bool:
    return bool(getattr(module, "is_transposed", False))
