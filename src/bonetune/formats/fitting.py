"""An adapter on the structure of its base model, without the base's weights in memory."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bonetune.errors import AdapterFileError, InputError
from bonetune.formats.checkpoint import Checkpoint, open_checkpoint
from bonetune.formats.pth_checkpoint import PthCheckpoint
from bonetune.formats.state import AdapterState
from bonetune.models import AUTO_CLASSES, skeleton
from bonetune.ops import Update
from bonetune.tuner import BoneLayer, BoneModel, check_tensors, layers_of
from bonetune.tuner.layer import name_without_adapters


@dataclass(frozen=True)
class Fitted:
    """An adapter and the layers of its base model that it is for.

    Args:
        state: the adapter.
        base: the base model's name or folder.
        model: the base model on the meta device, with the adapter's layers in it.
        layers: those layers by the names that they have in the base model. They know their sides, and how a stored weight
            is cut into matrices (`matrices`, `as_stored`); their values are not in memory.
    """

    state: AdapterState
    base: str
    model: Any
    layers: dict[str, BoneLayer]

    @cached_property
    def checkpoint(self) -> Checkpoint | PthCheckpoint:
        """The base model's weights, to be read one by one."""
        return open_checkpoint(self.base)

    def parameter(self, layer: str) -> str:
        """The adapted parameter's name in the base model."""
        return f"{layer}.{self.layers[layer].weight_name}".replace(".base_layer", "")

    def weight(self, layer: str) -> Tensor:
        """A layer's frozen weight as it is stored, read from the base model's files.

        Raises:
            InputError: it is not there, or stored as codes.
        """
        name = self._stored_name(layer)
        dtype = self.checkpoint.dtype(name)
        if not dtype.is_floating_point:
            stored = str(dtype).removeprefix("torch.")
            raise InputError(f"{self.base} stores {name} as {stored}: pass --base with its own weights.")
        return self.checkpoint.tensor(name)

    def _stored_name(self, layer: str) -> str:
        """Its own, or that of what it is tied to."""
        parameter = self.parameter(layer)
        named = {name_without_adapters(name): p for name, p in self.model.named_parameters(remove_duplicate=False)}
        tied = [name for name, other in named.items() if other is named[parameter] and name in self.checkpoint.names]
        return tied[0] if tied and parameter not in tied else self.checkpoint.name_of(parameter)

    def update(self, layer: str, scale: float = 1.0) -> Update:
        """The layer's update, as `bonetune.ops` takes it."""
        return Update(self.state.tensors[layer], self.state.spec(layer), scale)

    def delta(self, layer: str) -> Tensor:
        """Delta(W) of a layer, (out, in) or stacked, float32; W is read only if the variant depends on it."""
        from bonetune.ops import delta

        update, bone = self.update(layer), self.layers[layer]
        if update.spec.blockwise:
            weight = bone.matrices(self.weight(layer)).float()
        else:
            stacked = () if bone.number_of_matrices is None else (bone.number_of_matrices,)
            weight = torch.empty(1).expand(*stacked, bone.out_features, bone.in_features)
        return delta(weight, update.theta.float(), update.spec)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)


def fit(state: AdapterState, base: str | None = None, *, trust_remote_code: bool = False) -> Fitted:
    """Put an adapter on its base model's structure.

    Args:
        state: the adapter.
        base: the base model's name or folder; None: as the adapter says.
        trust_remote_code: run code that comes with the model.

    Raises:
        InputError: the adapter names no base model, or there is none of that name.
        AdapterFileError: tensors that are missing, not expected, or of other shapes than the base model has; all of them.
        SpecError, TargetError: the base model cannot have such an adapter.
    """
    name = base or state.config.base_model_name_or_path
    if not name:
        raise InputError(f"{state.source.path} names no base model: pass --base MODEL.")
    if base is None and state.config.revision and not Path(name).is_dir():
        raise InputError(
            f"{state.source.path} is of revision {state.config.revision} of {name}: pass --base with a folder of that revision."
        )
    task = str(state.config.task_type or "CAUSAL_LM")
    heads = [tensor for key, tensor in state.whole.items() if key.rpartition(".")[0] in ("score", "classifier")]
    labels = min((len(head) for head in heads), default=None)
    task = task if task in AUTO_CLASSES else "CAUSAL_LM"
    states = any(key.endswith(".att.time_state") for key in state.whole)
    model = skeleton(name, task_type=task, num_labels=labels, trust_remote_code=trust_remote_code, initial_state=states)
    plain = {
        name: tensor.shape for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.state_dict().items())
    }
    config = replace(state.config, bias="none", modules_to_save=None, trainable_token_indices=None, trainable_parameters=None)
    if state.config.adapts_layers:
        BoneModel(model, config, "default", low_cpu_mem_usage=True)
    layers = layers_of(model)
    wrong = [name for name in state.whole if name not in plain and not name.endswith(".trainable_tokens_delta")]
    if wrong:
        raise AdapterFileError(f"{state.source.path} has {wrong[0]} ({len(wrong)} such), which {name} has no parameter for.")
    shapes = [(key, tuple(tensor.shape), tuple(plain[key])) for key, tensor in state.whole.items() if key in plain]
    if misfits := [f"{key} has shape {own}, the base model's {base}" for key, own, base in shapes if own != base]:
        raise AdapterFileError(f"{state.source.path} does not fit {name}: {'; '.join(misfits)}.")
    check_tensors(config, "default", layers, state.tensors, known=set())
    return Fitted(state, name, model, layers)
