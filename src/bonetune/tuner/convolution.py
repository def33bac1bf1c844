"""The adapted convolution."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bonetune.ops import Update
from bonetune.ops.convolution import adapted_convolution, as_kernel, matrices
from bonetune.tuner.frozen import FrozenConv
from bonetune.tuner.layer import BoneLayer


class BoneConv(BoneLayer):
    """A convolution (`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`) with adapters of the Bone family.

    A kernel of K offsets holds K matrices (out_channels, in_channels / groups). Each is adapted as a Linear's weight is: the
    adapter's tensor is the Linear's for K = 1, and K of them stacked otherwise. See `bonetune.ops.convolution`.
    """

    @classmethod
    def sides(cls, module: Any, name: str = "weight") -> tuple[int, int]:
        return module.out_channels, module.in_channels // module.groups

    @property
    def number_of_matrices(self) -> int | None:
        offsets = math.prod(self._kernel_shape[2:])
        return None if offsets == 1 else offsets

    @property
    def _kernel_shape(self) -> torch.Size:
        kernel: Any = self.get_base_layer().weight
        return kernel.shape

    def matrices(self, stored: Tensor) -> Tensor:
        return matrices(stored)

    def as_stored(self, matrices: Tensor) -> Tensor:
        return as_kernel(matrices, self._kernel_shape)

    def adapted(self, x: Tensor, updates: Sequence[Update], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return adapted_convolution(FrozenConv(self, args, kwargs), x, updates)
