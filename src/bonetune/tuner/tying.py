"""One adapter for an embedding and what is tied to it, a head for instance: `ensure_weight_tying`.

They use one matrix (vocabulary, hidden), and all are adapted along hidden, so one tensor adapts them alike, and the merged
matrix is one again.
"""

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import find_parameter_name_by_module
from torch import nn

from bonetune.errors import InputError, TargetError
from bonetune.tuner.layer import BoneLayer, name_without_adapters


def tie_targets(model: Any, config: Any, tied: Sequence[str]) -> None:
    """Target the input embedding, whatever was named, and note the modules that are to share its adapter."""
    embedding = _embedding_name(model)
    if isinstance(config.target_modules, str):
        config.target_modules = f"(?:{config.target_modules})|(?:{re.escape(embedding)})"
    else:
        config.target_modules = {*(config.target_modules or ()), embedding}
    # a module that has adapters already is named by what is under them
    config.target_modules_to_tie = {name_without_adapters(name) for name in tied}


def tie_modules_to_save(model: Any, config: Any, tied: Sequence[str]) -> None:
    """Save the input embedding, whatever was named, and note the modules that are to share its copy."""
    embedding = _embedding_name(model)
    named = [name for name in config.modules_to_save or () if not any(f".{key}".endswith(f".{name}") for key in tied)]
    config.modules_to_save = named if embedding in named else [*named, embedding]
    config.modules_to_tie = set(tied)


def check_ties(model: Any, config: Any, targets: Iterable[str]) -> None:
    """Raise where an adapter could not be one for all that are tied, or would part what cannot be parted.

    Raises:
        InputError: `ensure_weight_tying` with an embedding that is excluded, with ranks of their own for tied modules, or with
            `modules_to_save` for a second adapter.
        TargetError: the input embedding, where other embeddings have its weight and stand for it, as in T5: it is never called.
    """
    targets, to_tie = set(targets), getattr(config, "target_modules_to_tie", None) or set()
    if to_tie:
        embedding = _embedding_name(model)
        if embedding not in targets:
            raise InputError(f"ensure_weight_tying adapts {embedding}, which `exclude_modules` leaves out: drop one of them.")
        for name in to_tie:
            if config.spec(name) != config.spec(embedding):
                raise InputError(
                    f"`rank_pattern` gives {name} r={config.spec(name).r} and {embedding} r={config.spec(embedding).r}, but "
                    "ensure_weight_tying adapts both by one tensor: give them one r."
                )
    elif config.ensure_weight_tying and any("modules_to_save" in name for name, _ in model.named_modules()):
        raise InputError("ensure_weight_tying with `modules_to_save` works for one adapter of a model, and it has one already.")
    for group in _embeddings_of_one_weight(model):
        others = sorted(name for name in group if name != _embedding_name(model))
        if len(others) < len(group) and _embedding_name(model) in targets and not targets & {*others}:
            raise TargetError(
                f"Target module {_embedding_name(model)} is never called: {', '.join(others)} have its weight and are called "
                f"in its place. Target {others[0].rsplit('.', 1)[-1]}, with ensure_weight_tying=True for one adapter for all."
            )


def tie_adapter(model: Any, config: Any, adapter_name: str) -> None:
    """Let the tied modules share the embedding's tensor, or its saved copy's weight; again, after a load that parted them."""
    if names := getattr(config, "target_modules_to_tie", None):
        embedding = model.get_input_embeddings()
        for layer in map(model.get_submodule, names):
            if isinstance(layer, BoneLayer) and adapter_name in layer.bone_block:
                layer.bone_block[adapter_name] = embedding.bone_block[adapter_name]
                layer.bone_spec[adapter_name] = embedding.bone_spec[adapter_name]
    if names := getattr(config, "modules_to_tie", None):
        saved = getattr(model.get_input_embeddings(), "modules_to_save", {})
        for wrapper in map(model.get_submodule, names):
            copies = getattr(wrapper, "modules_to_save", {})
            if adapter_name in saved and adapter_name in copies:
                copies[adapter_name].weight = saved[adapter_name].weight


@contextmanager
def keeping_ties(layers: Sequence[BoneLayer]) -> Iterator[None]:
    """Merge within it: layers that had one Parameter, and were merged to equal values, have one again."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for layer in layers:
        if layer.quantization_backend is None:
            base = layer.get_base_layer()
            owners.setdefault(id(getattr(base, layer.weight_name)), []).append((base, layer.weight_name))
    yield
    for (first, name), *others in owners.values():
        merged = getattr(first, name)
        for other, other_name in others:
            if getattr(other, other_name) is not merged and torch.equal(getattr(other, other_name), merged):
                setattr(other, other_name, merged)


@contextmanager
def warning_of_parted_embeddings(model: nn.Module) -> Iterator[None]:
    """Warn if embeddings that had one weight have several after what is done within: a model's file holds one."""
    groups = [[*group.values()] for group in _embeddings_of_one_weight(model)]
    yield
    if any(_weight(module) is not _weight(group[0]) for group in groups for module in group):
        warnings.warn(
            "Embeddings that had one weight have different ones after merging, and `save_pretrained` would write one of them: "
            "train such embeddings with ensure_weight_tying=True.",
            stacklevel=4,
        )


def _embeddings_of_one_weight(model: nn.Module) -> list[dict[str, nn.Module]]:
    """Groups of different embeddings that have one Parameter, by name."""
    groups: dict[int, dict[str, nn.Module]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            groups.setdefault(id(_weight(module)), {})[name_without_adapters(name)] = module
    return [group for group in groups.values() if len(group) > 1]


def _embedding_name(model: Any) -> str:
    return name_without_adapters(find_parameter_name_by_module(model, model.get_input_embeddings()))


def _weight(module: nn.Module) -> Any:
    return module._parameters.get("weight")
