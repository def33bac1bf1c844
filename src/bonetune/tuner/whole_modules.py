"""Modules that are trained whole beside an adapter (`modules_to_save`, a classifier's head), over a base in half precision."""

from functools import partial
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

_HALF = (torch.bfloat16, torch.float16)


def train_whole_modules_in_float32(model: nn.Module) -> None:
    """Give the trained copies of whole modules float32 parameters, as adapters have.

    In half precision most of Adam's steps would be rounded away, and its 1e-8 is nought in float16. Such a module computes in
    float32; what enters it and what leaves it has the base's dtype.
    """
    for wrapper in model.modules():
        if not isinstance(wrapper, ModulesToSaveWrapper):
            continue
        for module in wrapper.modules_to_save.values():
            half = next((p.dtype for p in module.parameters() if p.requires_grad and p.dtype in _HALF), None)
            if half is not None:
                module.float()
                module.register_forward_pre_hook(_widened)
                module.register_forward_hook(partial(_narrowed, half))


def _widened(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.float() if isinstance(value, Tensor) and value.dtype in _HALF else value for value in inputs)


def _narrowed(half: torch.dtype, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    return output.to(half) if isinstance(output, Tensor) and output.dtype == torch.float32 else output
