"""Another adapter's values in a live adapter's tensors: nothing is rebuilt, and a compiled model is not compiled again."""

import os
from typing import Any

import torch
from peft import PeftConfig, load_peft_weights, set_peft_model_state_dict
from torch import nn

from bonetune.errors import InputError
from bonetune.tuner.config import BoneConfig
from bonetune.tuner.layer import layers_of


def hotswap_adapter(
    model: nn.Module, model_name_or_path: str | os.PathLike[str], adapter_name: str = "default", **kwargs: Any
) -> None:
    """Put a saved adapter's tensors in the place of a loaded one's, in place.

    Args:
        model: a `PeftModel`, or a model of transformers or diffusers with `add_adapter`; or what `torch.compile` made of one.
        model_name_or_path: folder, or id on the hub, of an adapter of the same variant and r on the same layers.
        adapter_name: the adapter to overwrite; its name and settings stay.
        kwargs: for PEFT's `PeftConfig.from_pretrained` and `load_peft_weights`, such as `revision` or `subfolder`.

    Raises:
        InputError: no such adapter, one that is merged, or a file of another method, variant or r; nothing is changed.
        AdapterFileError: tensors that are missing, unexpected or of another shape; nothing is changed.

    Example:
        >>> model = torch.compile(PeftModel.from_pretrained(base, "first"))
        >>> hotswap_adapter(model, "second")
    """
    peft_model: Any = getattr(model, "_orig_mod", model)
    configs = getattr(peft_model, "peft_config", {})
    if not isinstance(configs.get(adapter_name), BoneConfig):
        raise InputError(
            f"The model has no Bone adapter named {adapter_name!r} to swap; it has {', '.join(configs) or 'none'}."
        )
    path = str(model_name_or_path)
    new = PeftConfig.from_pretrained(path, **kwargs)
    if not isinstance(new, BoneConfig):
        raise InputError(f"{path} holds an adapter of another method ({new.peft_type}).")
    wrapped = hasattr(peft_model, "get_base_model")
    for name, layer in layers_of(peft_model.get_base_model() if wrapped else peft_model).items():
        if adapter_name not in layer.bone_block:
            continue
        if adapter_name in layer.merged_adapters:
            raise InputError(f"Adapter {adapter_name!r} is merged: call `unmerge_adapter` before swapping it.")
        there, coming = layer.bone_spec[adapter_name], new.spec(layer.pattern_name(name))
        if (there.variant, layer.tensor_shape(there)) != (coming.variant, layer.tensor_shape(coming)):
            raise InputError(
                f"Only adapters of equal variant and r can be swapped, but on {name} the model has {there.variant} "
                f"(r={there.r}) and {path} has {coming.variant} (r={coming.r}): use `load_adapter` instead."
            )
    # in host memory first, and onto each layer's own device from there
    # of an adapted embedding a file holds the frozen weight too, which is there, and may have other adapters merged
    tensors = {k: t for k, t in load_peft_weights(path, device="cpu", **kwargs).items() if not k.endswith(".base_layer.weight")}
    if not wrapped:
        tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    with torch.no_grad():
        set_peft_model_state_dict(peft_model, tensors, adapter_name)
