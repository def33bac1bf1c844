"""The adapted Linear: holds the frozen layer and one tensor for each adapter, and calls `bonetune.ops`."""

import math
import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from bonetune.ops import Update, adapted_linear, delta, merge
from bonetune.spec import ShardSpec
from bonetune.tuner.frozen import FrozenBase


class BoneLayer(BaseTunerLayer):
    """State of the adapters on one layer: `bone_block[name]` is D or B, `bone_spec[name]` says which."""

    adapter_layer_names = ("bone_block",)
    other_param_names = ("bone_spec", "bone_dropout", "bone_scaling", "bone_exact")

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self.bone_block = nn.ParameterDict({})
        self.bone_spec: dict[str, ShardSpec] = {}
        self.bone_dropout = nn.ModuleDict({})
        self.bone_scaling: dict[str, float] = {}
        self.bone_exact: dict[str, bool] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        # The base weight as it was before merging: what makes unmerging exact. In a list, and so outside any state dict.
        self._unmerged_weight: list[Tensor] = []
        frozen = self.get_base_layer()
        self.in_features, self.out_features = int(frozen.in_features), int(frozen.out_features)  # pyright: ignore[reportArgumentType]  (nn.Module's attributes are untyped)

    def update_layer(
        self,
        adapter_name: str,
        spec: ShardSpec,
        *,
        zeros: bool = True,
        dropout: float = 0.0,
        exact: bool = False,
        inference_mode: bool = False,
        where: str = "this layer",
    ) -> None:
        """Add an adapter, or replace the one of that name.

        Args:
            adapter_name: its name.
            spec: variant and sizes.
            zeros: start at zero; else at random values.
            dropout: probability with which an element that enters the update is dropped.
            exact: whether a BAT update multiplies on its own; see `BoneConfig.exact_update`.
            inference_mode: whether the adapter starts frozen.
            where: the layer's name, for errors.

        Raises:
            SpecError: the variant cannot be defined on this layer's shape.
        """
        spec.check(self.out_features, self.in_features, where)
        block = torch.empty(spec.shape(self.out_features, self.in_features))
        if zeros:
            nn.init.zeros_(block)
        else:
            nn.init.kaiming_uniform_(block.flatten(0, -2) if block.dim() == 3 else block, a=math.sqrt(5))
        self.bone_block[adapter_name] = nn.Parameter(block)
        self.bone_spec[adapter_name] = spec
        self.bone_dropout[adapter_name] = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.bone_scaling[adapter_name] = 1.0
        self.bone_exact[adapter_name] = exact
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def updates(self, adapter_names: list[str]) -> list[Update]:
        """Those of the named adapters that this layer has, as `bonetune.ops` takes them."""
        blocks, training = self.bone_block, self.training  # pyright: ignore[reportAttributeAccessIssue]  (`training` comes from nn.Module)
        return [
            Update(
                blocks[name],
                self.bone_spec[name],
                self.bone_scaling[name],
                self._dropout(name, training),
                self.bone_exact[name],
            )
            for name in adapter_names
            if name in blocks
        ]

    def _dropout(self, name: str, training: bool) -> nn.Module | None:
        dropout = self.bone_dropout[name] if training else None
        return dropout if isinstance(dropout, nn.Dropout) else None

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply the adapter's update by `scale` instead of 1."""
        if adapter in self.bone_scaling:
            self.bone_scaling[adapter] = float(scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the updates of the active adapters by `scale`."""
        for name in self.active_adapters:
            if name in self.bone_scaling:
                self.bone_scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer(scale)`; without a scale, go back to 1."""
        for name in self.active_adapters:
            if name in self.bone_scaling:
                self.bone_scaling[name] = 1.0 if scale is None else self.bone_scaling[name] / scale

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Scale * Delta(W) of one adapter, (out, in), of the frozen W, in at least float32."""
        with torch.no_grad():
            weight = self._frozen_weight()
            wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
            theta = self.bone_block[adapter].to(wide.dtype)
            return self.bone_scaling[adapter] * delta(wide, theta, self.bone_spec[adapter])

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Every member of the family is W plus an update."""
        return True

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' updates to the base weight: in float32, from the frozen weight, rounded once.

        Args:
            safe_merge: refuse a result with NaN or infinity, leaving the base weight as it was.
            adapter_names: adapters to merge; None merges the active ones.

        Raises:
            ValueError: `safe_merge` found a value that is not finite.
        """
        adapter_names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.bone_block]
        if not adapter_names:
            return
        frozen = self._frozen_weight()
        merged = merge(frozen, self.updates([*self.merged_adapters, *adapter_names]))
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {', '.join(adapter_names)} seems to be broken")
        if not self._unmerged_weight:
            self._unmerged_weight = [frozen]
        self._put_weight(merged)
        self.merged_adapters.extend(adapter_names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base weight back as it was before merging, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._put_weight(self._frozen_weight())
        self._unmerged_weight.clear()
        self.merged_adapters.clear()

    def _frozen_weight(self) -> Tensor:
        """The weight without adapters, on the device and in the dtype that the layer has now."""
        now: Any = self.get_base_layer().weight if self.quantization_backend is None else self.get_base_weight()
        return self._unmerged_weight[0].to(now.device, now.dtype) if self._unmerged_weight else now

    def _put_weight(self, weight: Tensor) -> None:
        """Give the base layer another weight; the Parameter it had is not written to.

        It may be tied to another layer's, an embedding's for instance, which a merge must not change. Unmerging puts the very
        Parameter back, and with it the tie.
        """
        if self.quantization_backend is not None:
            self.set_base_weight(weight)
            return
        frozen = self.get_base_layer()
        if not isinstance(weight, nn.Parameter):
            weight = nn.Parameter(weight, requires_grad=bool(frozen.weight.requires_grad))  # pyright: ignore[reportAttributeAccessIssue]  (untyped in nn.Module)
        frozen.weight = weight


class BoneLinear(nn.Module, BoneLayer):
    """A Linear (plain or quantized) with adapters of the Bone family."""

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        super().__init__()
        BoneLayer.__init__(self, base_layer, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., in) -> (..., out), in the dtype that the base layer returns for x."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        updates = self.updates(self.active_adapters)
        if not updates:
            return self.base_layer(x, *args, **kwargs)
        return adapted_linear(FrozenBase(self, args, kwargs), x, updates)

    def __repr__(self) -> str:
        return "bone." + super().__repr__()
