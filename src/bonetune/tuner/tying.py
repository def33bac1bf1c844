"""One adapter for an embedding and the head that is tied to it: `ensure_weight_tying`.

Both use one matrix (vocabulary, hidden), and both are adapted along hidden, so one tensor adapts both alike, and the merged
matrix is one again.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import find_parameter_name_by_module
from torch import nn

from bonetune.tuner.layer import BoneLayer


def tie_targets(model: Any, config: Any, tied: Sequence[str]) -> None:
    """Target the input embedding, whatever was named, and note the modules that are to share its adapter."""
    embedding = find_parameter_name_by_module(model, model.get_input_embeddings())
    if isinstance(config.target_modules, str):
        config.target_modules = f"(?:{config.target_modules})|(?:{re.escape(embedding)})"
    else:
        config.target_modules = {*(config.target_modules or ()), embedding}
    config.target_modules_to_tie = set(tied)


def tie_modules_to_save(model: Any, config: Any, tied: Sequence[str]) -> None:
    """Save the input embedding, whatever was named, and note the modules that are to share its copy."""
    embedding = find_parameter_name_by_module(model, model.get_input_embeddings())
    named = [name for name in config.modules_to_save or () if not any(f".{key}".endswith(f".{name}") for key in tied)]
    config.modules_to_save = named if embedding in named else [*named, embedding]
    config.modules_to_tie = set(tied)


@contextmanager
def keeping_ties(layers: Sequence[BoneLayer]) -> Iterator[list[bool]]:
    """Merge within it: layers that had one Parameter, and were merged to equal values, have one again.

    Yields a list that is not empty afterwards if there were such layers.
    """
    owners: dict[int, list[BoneLayer]] = {}
    for layer in layers:
        if layer.quantization_backend is None:
            owners.setdefault(id(_weight(layer)), []).append(layer)
    bases = [[(layer.get_base_layer(), layer.weight_name) for layer in group] for group in owners.values() if len(group) > 1]
    retied: list[bool] = []
    yield retied
    for (first, name), *others in bases:
        for other, other_name in others:
            if getattr(other, other_name) is not getattr(first, name) and torch.equal(
                getattr(other, other_name), getattr(first, name)
            ):
                setattr(other, other_name, getattr(first, name))
                retied.append(True)


def _weight(layer: BoneLayer) -> nn.Parameter:
    return getattr(layer.get_base_layer(), layer.weight_name)
