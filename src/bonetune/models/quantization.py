"""Frozen weights in four or eight bits."""

import importlib.util
import logging
from typing import Any

import torch

from bonetune.errors import InputError

QUANTIZATIONS = ("nf4", "fp4", "int8", "torchao-int8", "torchao-int4")


def quantization_config(
    name: str, dtype: str = "auto", double_quantization: bool = False, heads: list[str] | None = None
) -> Any:
    """What transformers is told to load a model's Linear layers quantized; the language model's head stays as it is.

    Args:
        name: `nf4`, `fp4`, `int8` (bitsandbytes), `torchao-int8`, `torchao-int4` (groups of 32).
        dtype: of the products with 4-bit weights; `auto` is bfloat16.
        double_quantization: quantize the scales of 4-bit weights too.
        heads: names of modules that stay as they are; None: transformers finds the language model's head.

    Raises:
        InputError: an unknown name, or a package that is not installed.
    """
    if name not in QUANTIZATIONS:
        raise InputError(f"Unknown quantization {name!r}: choose from {', '.join(QUANTIZATIONS)}.")
    package = "torchao" if name.startswith("torchao") else "bitsandbytes"
    if importlib.util.find_spec(package) is None:
        raise InputError(f"quantization {name} needs {package}: pip install {package}")
    if package == "torchao":
        return _torchao(name, heads)
    from transformers import BitsAndBytesConfig

    if name == "int8":
        # else each product is announced to be one of 16-bit numbers
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=heads)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=heads,
        bnb_4bit_quant_type=name,
        bnb_4bit_use_double_quant=double_quantization,
        bnb_4bit_compute_dtype=getattr(torch, "bfloat16" if dtype == "auto" else dtype),
    )


def let_train(model: Any) -> None:
    """Tell transformers that adapters on torchao's weights can be trained: the weights stay as they are."""
    from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

    class Trainable(TorchAoHfQuantizer):
        is_trainable = True  # pyright: ignore[reportAssignmentType]  (a property there)

    if isinstance(getattr(model, "hf_quantizer", None), TorchAoHfQuantizer):
        model.hf_quantizer.__class__ = Trainable


def _torchao(name: str, heads: list[str] | None) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup
    from transformers import TorchAoConfig

    if name == "torchao-int8":
        return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=heads)
    int4: torch.dtype = torch.int4  # pyright: ignore[reportAttributeAccessIssue]  (made at import)
    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=int4, granularity=PerGroup(32)), modules_to_not_convert=heads)
