"""PEFT's MiSS layers on our ops, for people who stay with PEFT's MiSS."""

from typing import Any

import torch
from peft.tuners.miss.layer import MissLinear
from torch import Tensor, nn

from bonetune.errors import TargetError
from bonetune.ops import Update, adapted_linear
from bonetune.ops.backend import Backend
from bonetune.spec import ShardSpec, parse_variant
from bonetune.tuner.frozen import FrozenBase


def accelerate_miss(model: nn.Module, *, exact_update: bool = True) -> int:
    """Let the MiSS layers of a PEFT model compute with `bonetune.ops`: the same function, parameters and files, faster.

    Args:
        model: a model with PEFT's MiSS adapters (`MissConfig`), of any `init_weights`; its layers are changed in place.
            Call it again after adding adapters to further layers.
        exact_update: for `init_weights="bat"` over a base narrower than the adapter, keep the update a product of its own,
            as precise as PEFT's wide weight. False is faster; see `BoneConfig.exact_update`.

    Returns:
        How many layers were changed.

    Raises:
        TargetError: the model has no MiSS layer.

    Example:
        >>> model = PeftModel.from_pretrained(model, "a-miss-adapter")
        >>> accelerate_miss(model)
    """
    layers = [module for module in model.modules() if isinstance(module, MissLinear)]
    if not layers:
        raise TargetError("The model has no MiSS layer: accelerate_miss takes a model that PEFT gave an adapter by MissConfig.")
    plain = [layer for layer in layers if type(layer) is MissLinear]
    for layer in plain:
        layer.__class__ = AcceleratedMissLinear
    for layer in layers:
        setattr(layer, "exact_update", exact_update)  # noqa: B010  (nn.Module declares tensors and modules only)
    return len(plain)


class AcceleratedMissLinear(MissLinear):
    """A `MissLinear` whose forward is `adapted_linear`; everything else is PEFT's."""

    exact_update: bool
    backend: Backend = "auto"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., in) -> (..., out), in x's dtype."""
        updates = None if self.disable_adapters or self.merged else self._updates(x)
        if not updates:
            return super().forward(x, *args, **kwargs)
        return adapted_linear(FrozenBase(self, args, kwargs), x, updates, self.backend).to(x.dtype)

    def _updates(self, x: Tensor) -> list[Update] | None:
        """The active adapters, or None where PEFT's function is not the sum of their updates in the dtype of x."""
        weight: Any = self.get_base_layer().weight
        names = [name for name in self.active_adapters if name in self.miss_block]
        if self.miss_fn == "bat":
            backend = self.quantization_backend
            if len(names) > 1 or (backend is not None and not backend.supports_merge):
                return None  # PEFT transforms the first adapter's result by the second
            if backend is None and x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
                return None  # PEFT computes in the wider one
        updates = []
        for name in names:
            theta, dropout = self.miss_block[name], self.miss_dropout[name]
            variant = parse_variant(str(self.miss_fn) if self.miss_fn in ("bat", "mini") else "bone")
            spec = ShardSpec(variant, theta.shape[1 if variant == "bat" else 0], theta.shape[1] if variant == "mini" else 1)
            if tuple(theta.shape) != spec.shape(self.out_features, self.in_features):
                return None  # of another kind than the layer's first adapter, whose kind PEFT goes by
            narrower = torch.promote_types(weight.dtype, theta.dtype) != weight.dtype
            drops = self.training and isinstance(dropout, nn.Dropout) and variant != "bat"  # PEFT's BAT has no dropout
            updates.append(Update(theta, spec, dropout=dropout if drops else None, exact=self.exact_update and narrower))
        return updates
