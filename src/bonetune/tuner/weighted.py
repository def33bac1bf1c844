"""Adapters added up into a new one. Updates are linear in their tensors, so for equal variants and r the sum is exact."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft.utils import merge_utils
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from bonetune.errors import InputError
from bonetune.tuner.config import BoneConfig
from bonetune.tuner.layer import BoneLayer, layers_of

# by name: what is done with the tensors of one layer, given their weights and the user's settings
COMBINATIONS = {
    "linear": lambda tensors, weights, **_: merge_utils.task_arithmetic(tensors, weights),
    "ties": lambda tensors, weights, **settings: merge_utils.ties(tensors, weights, **settings),
    "dare_linear": lambda tensors, weights, *, density, **_: merge_utils.dare_linear(tensors, weights, density),
    "dare_ties": lambda tensors, weights, **settings: merge_utils.dare_ties(tensors, weights, **settings),
    "magnitude_prune": lambda tensors, weights, *, density, **_: merge_utils.magnitude_prune(tensors, weights, density),
}


def combined_config(
    model: nn.Module, configs: Mapping[str, Any], adapters: Sequence[str], weights: Sequence[float]
) -> BoneConfig:
    """The configuration of an adapter that holds the others' sum: on every layer that one of them has.

    Raises:
        InputError: adapters that are not there, or whose tensors cannot be added; the message names the first layer on which
            they differ.
    """
    if not adapters or len(adapters) != len(weights):
        raise InputError(f"Got {len(adapters)} adapters and {len(weights)} weights: each adapter needs one weight.")
    if unknown := [name for name in adapters if name not in configs]:
        raise InputError(f"Adapter {', '.join(unknown)} does not exist; there are {', '.join(configs)}.")
    for name in adapters:
        if configs[name].bias != "none":
            raise InputError(f"Adapter {name} trains biases (bias={configs[name].bias!r}), which have no sum.")
        if configs[name].target_parameters:
            raise InputError(f"Adapter {name} targets parameters, which add_weighted_adapter does not support.")
        if trained := configs[name].trainable_parameters:
            raise InputError(f"Adapter {name} trains whole parameters (trainable_parameters={trained!r}), which have no sum.")
    for key, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and (owners := sorted(set(adapters) & module._adapters)):
            raise InputError(f"{key} is trained whole by {', '.join(owners)}: whole modules have no sum.")
    specs = {}
    for key, layer in _layers(model, adapters):
        here = {name: layer.bone_spec[name] for name in adapters if name in layer.bone_block}
        if len({(spec.variant, layer.bone_block[name].shape) for name, spec in here.items()}) > 1:
            kinds = ", ".join(f"{name} {spec.variant} (r={spec.r})" for name, spec in here.items())
            raise InputError(
                f"Only adapters of equal variant and r can be added, but on {key} they are {kinds}. Make them active together, "
                "or merge one after the other: their updates add."
            )
        specs[key] = next(iter(here.values()))
    variants = sorted({str(configs[name].variant) for name in adapters})
    if len(variants) > 1:
        raise InputError(f"Only adapters of one variant can be added, got {', '.join(variants)}.")
    first = configs[adapters[0]]
    return replace(
        first,
        target_modules=set(specs),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern={key: spec.r for key, spec in specs.items() if spec.r != first.r},
        init_weights=True,
    )


@torch.no_grad()
def combine(
    model: nn.Module, adapters: Sequence[str], weights: Sequence[float], into: str, combination_type: str, **settings: Any
) -> None:
    """Fill the adapter `into`: on each layer, its tensor becomes the combination of the others' scaled tensors."""
    for _, layer in _layers(model, adapters):
        present = [(name, weight) for name, weight in zip(adapters, weights, strict=True) if name in layer.bone_block]
        blocks = [layer.bone_block[name].data for name, _ in present]
        wide = functools.reduce(torch.promote_types, (block.dtype for block in blocks), torch.float32)
        tensors = [block.to(wide) * layer.bone_scaling[name] for (name, _), block in zip(present, blocks, strict=True)]
        factors = torch.tensor([weight for _, weight in present], device=tensors[0].device, dtype=wide)
        layer.bone_block[into].data.copy_(COMBINATIONS[combination_type](tensors, factors, **settings))


def _layers(model: nn.Module, adapters: Sequence[str]) -> Iterator[tuple[str, BoneLayer]]:
    for key, layer in layers_of(model).items():
        if any(name in layer.bone_block for name in adapters):
            yield key, layer
