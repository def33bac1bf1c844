"""The trained update times a factor: W + s (W' - W). Several factors tell how what was learned and forgotten trade off."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model_state_dict
from torch import Tensor

from bonetune.models import CLASSIFIERS_HEADS, Loaded, load_base

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

        An adapter that is linear in its tensors stays as it is. Another one is merged into its base, in the base's dtype. A
        classifier's head has no state without training, and stays as trained.
        """
        changed = _in_the_adapter(loaded)
        return cls.between(merged(loaded)) if changed is None else cls(loaded, changed)

    @classmethod
    def between(cls, loaded: Loaded, base: str | None = None) -> "Update":
        """The difference of a model to its base; what the base does not have stays as it is."""
        dtype, labels = str(loaded.model.dtype).removeprefix("torch."), getattr(loaded.model.config, "num_labels", 0)
        classes = [str(n) for n in range(labels)] if loaded.task_type == "SEQ_CLS" else None
        before = load_base(base or loaded.base, dtype, task_type=loaded.task_type, classes=classes).model.state_dict()
        live = loaded.model.state_dict()
        changed = [
            (tensor, tensor.clone(), before[name].to(tensor.device))
            for name, tensor in live.items()
            if name in before and tensor.is_floating_point() and not _is_head(name, loaded)
            if not torch.equal(tensor, before[name].to(tensor.device))
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


def _is_head(name: str, loaded: Loaded) -> bool:
    return loaded.task_type == "SEQ_CLS" and any(part in CLASSIFIERS_HEADS for part in name.split("."))


def _in_the_adapter(loaded: Loaded) -> list[tuple[Tensor, Tensor, Tensor | None]] | None:
    """The tensors that the update is linear in; None if it is not, or if there is more to it than those."""
    config: Any = loaded.model.peft_config[loaded.model.active_adapter]
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in _LINEAR_IN or getattr(config, "use_dora", False):
        return None
    names = list(get_peft_model_state_dict(loaded.model))
    linear = [name for name in names if any(part in name for part in _LINEAR_IN[kind])]
    rest = [name for name in names if name not in linear and not any(part in name for part in _BESIDE[kind])]
    if not all(_is_head(name, loaded) for name in rest):
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
