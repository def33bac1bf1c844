"""`AdapterState`: an adapter of the Bone family, whatever file it came from."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bonetune.errors import AdapterFileError
from bonetune.spec import ShardSpec
from bonetune.tuner import BoneConfig


@dataclass(frozen=True)
class Source:
    """Where an adapter was read from.

    Args:
        format: one of `bonetune.formats.READERS`.
        path: the folder or file.
        files: sha256 of each file that was read, by its name.
        base_fingerprint: of the base model that the adapter was trained on (`Checkpoint.fingerprint`), if it is noted there.
    """

    format: str
    path: str
    files: Mapping[str, str] = field(default_factory=dict)
    base_fingerprint: str | None = None


@dataclass(frozen=True)
class AdapterState:
    """An adapter: what is trained, what it means, what it belongs to.

    Args:
        config: variant, r by module, what is targeted, the base model's name. It is the canonical description; every format's
            own configuration is read into it and made from it.
        tensors: the trainable tensor of each adapted layer, D or B (shapes in `bonetune.spec`), by the layer's name in the
            base model: `model.layers.0.self_attn.q_proj`.
        whole: tensors that are trained whole and replace the base model's (a classifier's head, biases, norms), by the
            parameter's name in the base model: `score.weight`.
        source: where it was read from.
        notes: what a reader decided that the file does not say in so many words; the report of a conversion lists them.
    """

    config: BoneConfig
    tensors: dict[str, Tensor]
    whole: dict[str, Tensor]
    source: Source
    notes: tuple[str, ...] = ()

    def spec(self, layer: str) -> ShardSpec:
        """What the tensor of the layer of that name means."""
        return self.config.spec(layer)

    def with_notes(self, *notes: str) -> "AdapterState":
        """The same adapter with more notes."""
        return replace(self, notes=(*self.notes, *notes))

    def check(self) -> "AdapterState":
        """Return the state itself if its tensors can be what the configuration says, and are finite.

        What only the base model tells (its sides, missing layers) is checked by `fit`.

        Raises:
            AdapterFileError: naming every tensor that cannot.
        """
        wrong = []
        for name, tensor in self.tensors.items():
            spec = self.spec(name)
            if not _can_be(tuple(tensor.shape), spec):
                wrong.append(f"{name} has shape {tuple(tensor.shape)}, which is no {spec.variant} tensor of r={spec.r}")
        wrong += [
            f"{name} holds {tensor.dtype}, no floating-point numbers"
            for name, tensor in self.tensors.items()
            if not tensor.is_floating_point()
        ]
        wrong += [
            f"{name} has values that are not finite"
            for name, tensor in (self.tensors | self.whole).items()
            if not bool(torch.isfinite(tensor).all())
        ]
        if not self.tensors and (not self.whole or self.config.adapts_layers):
            wrong.append("there is no tensor of an adapter in it")
        if wrong:
            raise AdapterFileError(f"{self.source.path} cannot be read as {self.source.format}: {'; '.join(wrong)}.")
        return self


def rank_settings(ranks: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """The most frequent of the layers' ranks, and those of the layers that have another one (`rank_pattern`)."""
    most = max(set(ranks.values()), key=[*ranks.values()].count)
    return most, {layer: rank for layer, rank in ranks.items() if rank != most}


def _can_be(shape: tuple[int, ...], spec: ShardSpec) -> bool:
    """Whether a tensor of this shape can be of this spec on some weight, or on several that are stacked."""
    match spec.variant:
        case "bone":
            own: tuple[Any, ...] = (spec.r, None)
        case "mini":
            own = (spec.r, spec.mini_r)
        case "bat-free":
            own = (1, spec.r, spec.r)
        case _:
            own = (None, spec.r, spec.r)
    sides = shape[-len(own) :]
    return len(shape) in (len(own), len(own) + 1) and all(want in (None, have) for want, have in zip(own, sides, strict=True))
