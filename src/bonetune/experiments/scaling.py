"""The trained update times a factor: W + s (W' - W). Several factors tell how what was learned and forgotten trade off."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model_state_dict
from torch import Tensor

from bonetune.models import Loaded, load_base

# Adapters whose update is linear in some of their tensors, which are 0 without an update: those tensors' names.
_LINEAR_IN = {"BONE": ("bone_",), "LORA": ("lora_B", "lora_embedding_B"), "MISS": ("miss_",)}
_BESIDE = {"BONE": (), "LORA": ("lora_A", "lora_embedding_A"), "MISS": ()}


@dataclass(frozen=True)
class Update:
    """What training changed: each live tensor with its trained value and the one that it had without an update.

    Args:
        loaded: the model that the tensors are of.
        changed: (live, trained, before); `before` is None where it is 0.
    """

    loaded: Loaded
    changed: list[tuple[Tensor, Tensor, Tensor | None]]

    @classmethod
    def of(cls, loaded: Loaded) -> "Update":
        """The update of an adapted model.

        An adapter that is linear in its tensors stays as it is. Another one is merged into its base, in the base's dtype.
        """
        return cls(loaded, _in_the_adapter(loaded) or []) if _in_the_adapter(loaded) else cls.between(merged(loaded))

    @classmethod
    def between(cls, loaded: Loaded, base: str | None = None) -> "Update":
        """The difference of a model to its base; what the base does not have stays as it is."""
        before = load_base(base or loaded.base, str(loaded.model.dtype).removeprefix("torch.")).model.state_dict()
        live = loaded.model.state_dict()
        changed = [
            (tensor, tensor.clone(), before[name].to(tensor.device))
            for name, tensor in live.items()
            if name in before and tensor.is_floating_point() and not torch.equal(tensor, before[name].to(tensor.device))
        ]
        return cls(loaded, changed)

    @contextmanager
    @torch.no_grad()
    def scaled(self, factor: float) -> Iterator[Loaded]:
        """While it is open, the update is `factor` times what was trained."""
        try:
            for live, trained, before in self.changed:
                live.copy_(trained * factor if before is None else before + factor * (trained - before))
            yield self.loaded
        finally:
            for live, trained, _ in self.changed:
                live.copy_(trained)


def merged(loaded: Loaded) -> Loaded:
    """The adapter in the weights."""
    return Loaded(loaded.model.merge_and_unload(), loaded.tokenizer, loaded.base, None, loaded.task_type)


def _in_the_adapter(loaded: Loaded) -> list[tuple[Tensor, Tensor, Tensor | None]] | None:
    """The tensors that the update is linear in; None if it is not, or if there is more to it than those."""
    config: Any = loaded.model.peft_config[loaded.model.active_adapter]
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in _LINEAR_IN or getattr(config, "use_dora", False):
        return None
    names = list(get_peft_model_state_dict(loaded.model))
    linear = [name for name in names if any(part in name for part in _LINEAR_IN[kind])]
    if not all(name in linear or any(part in name for part in _BESIDE[kind]) for name in names):
        return None
    live = dict(loaded.model.named_parameters())
    adapter = loaded.model.active_adapter
    found = []
    for name in linear:
        stem, _, end = name.rpartition(".")
        parameter = live.get(f"{stem}.{adapter}.{end}")
        parameter = parameter if parameter is not None else live[f"{name}.{adapter}"]
        found.append((parameter.data, parameter.data.clone(), None))
    return found
