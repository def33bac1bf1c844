"""Quantized layers: kept readable while they are adapted, and turned into plain ones where a merge is to stay exact."""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from torch import Tensor, nn

from bonetune.errors import TargetError
from bonetune.tuner.original import put_weight

# How transformers marks a quantized model, and the configurations of its parts.
_MARKS = (
    "hf_quantizer",
    "quantization_method",
    "is_quantized",
    "is_loaded_in_4bit",
    "is_loaded_in_8bit",
    "hqq_quantized",
)
_CONFIG_MARKS = ("quantization_config", "_is_quantized")


def dequantize_layers(model: nn.Module) -> list[nn.Module]:
    """Make every quantized layer of `model`, adapted or not, a plain one with the dequantized weight; return them.

    Weights get the dtype in which the backend dequantizes, or the model's if that is wider.

    Raises:
        TargetError: a layer whose values its backend does not give; nothing is changed.
    """
    quantization = get_quantization_kwargs(model)
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    backends = {}
    for parent_name, parent in model.named_modules():
        for name, module in parent._modules.items():
            if module is None or isinstance(module, BaseTunerLayer):
                continue
            if module not in places and (backend := resolve_quantization_backend(module, **quantization)) is not None:
                if reason := unreadable(module, backend):
                    raise TargetError(f"{_name(parent, parent_name, name)} cannot be dequantized: {reason}")
                places[module], backends[module] = [], backend
            if module in places:
                places[module].append((parent, name))
    dtype = getattr(model, "dtype", None)
    return [_replace(module, backends[module], places[module], dtype) for module in places]


def unreadable(module: nn.Module, backend: Any) -> str | None:
    """Why the backend does not give the values of the layer's weight; None if it does."""
    try:
        backend.get_base_weight(module)
    except (TypeError, NotImplementedError) as error:
        return str(error) or type(error).__name__
    return None


def forget_quantization(model: nn.Module) -> None:
    """Remove transformers' marks of a quantized model, so that it is saved and loaded as a plain one."""
    for module in model.modules():
        _remove(module, _MARKS)
        if hasattr(config := getattr(module, "config", None), "__dict__"):
            _remove(config, _CONFIG_MARKS)


def keep_readable(model: nn.Module) -> None:
    """Keep bitsandbytes' 4-bit layers in the format from which they can be dequantized.

    On a CPU with AVX512-BF16 they otherwise lay out their codes anew in evaluation, and round their scales. Dequantizing
    would then give noise and training would get no gradients through the layer, both without an error. Layers to which that
    has happened are laid out as they were; their scales stay rounded to bfloat16.
    """
    layers: Iterator[Any] = model.modules()
    for layer in layers:
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            layer.support_avx512bf16_for_cpu = False
            if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
                _unpack(layer.weight)


def _unpack(weight: Any) -> None:
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    state = weight.quant_state
    scales = state.absmax.T.reshape(-1).float()  # the library's inverse leaves them transposed, or quantizes them again
    state.original_nested = False
    weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(weight.data, state)
    weight.quant_state.absmax, weight.quant_state.state2 = scales, None


@torch.no_grad()
def _replace(module: Any, backend: Any, places: list[tuple[nn.Module, str]], dtype: torch.dtype | None) -> nn.Module:
    weight: Tensor = backend.get_base_weight(module)
    weight = weight.to(torch.promote_types(weight.dtype, dtype or weight.dtype))
    if backend.backend_name == "torchao":  # a layer of torch whose weight is a subclass of Tensor
        put_weight(module, "weight", weight)
        _remove(module, ("extra_repr",))
        plain = module
    else:
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta").train(module.training)
        plain.weight = nn.Parameter(weight, requires_grad=False)
    if (bias := getattr(module, "bias", None)) is not None:
        plain.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=bias.requires_grad)
    if plain is not module and hasattr(module, "_hf_hook"):
        hook = module._hf_hook
        remove_hook_from_module(module)
        add_hook_to_module(plain, hook)
    for parent, name in places:
        setattr(parent, name, plain)
        if isinstance(parent, BaseTunerLayer):
            parent.quantization_backend = None
    return plain


def _name(parent: nn.Module, parent_name: str, name: str) -> str:
    """The layer's name in the model without adapters."""
    return parent_name if isinstance(parent, BaseTunerLayer) else f"{parent_name}.{name}".lstrip(".")


def _remove(owner: Any, names: tuple[str, ...]) -> None:
    for name in names:
        vars(owner).pop(name, None)
