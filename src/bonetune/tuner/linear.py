"""The adapted Linear: plain, quantized, or a `Conv1D` of transformers, which stores its weight transposed."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bonetune.ops import Update, adapted_linear
from bonetune.tuner.frozen import FrozenBase
from bonetune.tuner.layer import BoneLayer


class BoneLinear(BoneLayer):
    """A Linear with adapters of the Bone family. x (..., in) -> (..., out), in the dtype that the base layer returns.

    Args:
        base_layer: an `nn.Linear`, a quantized Linear that PEFT knows, or GPT-2's `Conv1D`, whose weight is W transposed.
        kwargs: what PEFT's `get_quantization_kwargs` found.
    """

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        super().__init__(base_layer, **kwargs)
        self._transposed = isinstance(self.get_base_layer(), Conv1D)

    @classmethod
    def sides(cls, module: nn.Module, name: str = "weight") -> tuple[int, int]:
        if isinstance(module, Conv1D):
            return int(module.nf), int(module.nx)
        return int(module.out_features), int(module.in_features)  # pyright: ignore[reportArgumentType]  (nn.Module's attributes are untyped)

    def matrices(self, stored: Tensor) -> Tensor:
        return stored.T if self._transposed else stored

    def as_stored(self, matrices: Tensor) -> Tensor:
        return matrices.T.contiguous() if self._transposed else matrices

    def adapted(self, x: Tensor, updates: Sequence[Update], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return adapted_linear(FrozenBase(self, args, kwargs), x, updates, self.backend)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True
