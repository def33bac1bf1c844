"""What all adapted layers have in common: one tensor for each adapter, scaling, merging, batches of several adapters."""

import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge, onload_layer
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from bonetune.errors import InputError
from bonetune.ops import Rows, Update, delta, merge, unmerge
from bonetune.ops.backend import Backend
from bonetune.spec import ShardSpec
from bonetune.tuner.frozen import base_weight
from bonetune.tuner.held import whole
from bonetune.tuner.original import Original, put_weight

# What stands in `adapter_names` for a row of the batch that no adapter is for.
NO_ADAPTER = "__base__"


class AdapterNames(tuple[str, ...]):
    """The adapter of each row of a batch, by name; made once for all the layers that the batch goes through."""

    rows: dict[str, Rows]

    def __new__(cls, names: Iterable[str]) -> "AdapterNames":
        made, numbers = super().__new__(cls, names), defaultdict[str, list[int]](list)
        for row, name in enumerate(made):
            if name != NO_ADAPTER:
                numbers[name].append(row)
        made.rows = {name: Rows(rows) for name, rows in numbers.items()}
        return made

    @classmethod
    def of(cls, names: Sequence[str]) -> "AdapterNames":
        """The names themselves if they are these already."""
        return names if isinstance(names, cls) else cls(names)


class BoneLayer(nn.Module, BaseTunerLayer):
    """State of the adapters on one layer: `bone_block[name]` is D or B, `bone_spec[name]` says which.

    Subclasses say which matrices the layer's weight consists of (`matrices`, `as_stored`), and how it is called (`adapted`).

    Args:
        base_layer: the layer to adapt; it becomes `base_layer`.
        weight_name: the adapted parameter's name in it.
        kwargs: what PEFT's `get_quantization_kwargs` found.
    """

    adapter_layer_names = ("bone_block",)
    other_param_names = ("bone_spec", "bone_dropout", "bone_scaling", "bone_exact")
    # By what updates are computed; `bonetune.set_backend` changes it. It belongs to no adapter and stands in no file.
    backend: Backend = "auto"

    def __init__(self, base_layer: nn.Module, weight_name: str = "weight", **kwargs: Any) -> None:
        super().__init__()
        self.weight_name = weight_name
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
        # Whether merging keeps the weight as it was, so that unmerging restores every bit; else it is computed back.
        self.exact_unmerge = True
        # The merged updates, of which the base weight is made, and what it was before. Both stay outside any state dict.
        self._merged_updates: list[Update] = []
        self._original: list[Original] = []
        # How far requantization took the last merge from what was merged: root mean squares of that error and of the update.
        self.requantization: tuple[float, float] | None = None
        self.out_features, self.in_features = self.sides(self.get_base_layer(), weight_name)

    @classmethod
    def sides(cls, module: nn.Module, name: str = "weight") -> tuple[int, int]:
        """(out, in) of each matrix that the weight of such a base layer consists of."""
        raise NotImplementedError

    def matrices(self, stored: Tensor) -> Tensor:
        """The stored weight as (out, in), or as (any number, out, in) for matrices that are adapted each by its own tensor."""
        return stored

    def as_stored(self, matrices: Tensor) -> Tensor:
        """The inverse of `matrices`."""
        return matrices

    def adapted(self, x: Tensor, updates: Sequence[Update], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What the base layer would return with the updated weight."""
        raise NotImplementedError

    @property
    def number_of_matrices(self) -> int | None:
        """How many matrices `matrices` stacks; None for a single one, which is not stacked."""
        return None

    def tensor_shape(self, spec: ShardSpec) -> tuple[int, ...]:
        """Shape of an adapter's tensor on this layer: the spec's, for each of the stacked matrices if there are any."""
        stacked = () if self.number_of_matrices is None else (self.number_of_matrices,)
        return (*stacked, *spec.shape(self.out_features, self.in_features))

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
        block = torch.empty(self.tensor_shape(spec))
        if zeros:
            nn.init.zeros_(block)
        else:
            nn.init.kaiming_uniform_(block.flatten(0, -2), a=math.sqrt(5))
        self.bone_block[adapter_name] = nn.Parameter(block)
        self.bone_spec[adapter_name] = spec
        self.bone_dropout[adapter_name] = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.bone_scaling[adapter_name] = 1.0
        self.bone_exact[adapter_name] = exact
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def pattern_name(self, module_name: str) -> str:
        """What `rank_pattern` is matched against, for a layer of that name in the model."""
        return module_name

    @property
    def keeps_original(self) -> bool:
        """Whether it holds the weight that was there before a merge."""
        return bool(self._original)

    def forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        """The adapted layer; with `adapter_names`, each row of the batch by the adapter named for it."""
        if self.disable_adapters:
            self._unmerge_disabled()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            updates = self._updates_by_row(x, adapter_names)
        elif self.merged:
            return self.base_layer(x, *args, **kwargs)
        else:
            updates = self.updates(self.active_adapters)
        if not updates:
            return self.base_layer(x, *args, **kwargs)
        if not x.is_meta and any(update.theta.is_meta for update in updates):
            raise InputError(
                f"Adapter {', '.join(self.active_adapters)} has no values yet: it is on the meta device. Load its tensors "
                "(low_cpu_mem_usage=True leaves that to you), and adapt a model before it is offloaded, not after."
            )
        return self.adapted(x, updates, args, kwargs)

    def updates(self, adapter_names: Sequence[str]) -> list[Update]:
        """Those of the named adapters that this layer has, as `bonetune.ops` takes them."""
        return [
            Update(
                whole(self.bone_block, name, self.bone_block[name]),
                self.bone_spec[name],
                self.bone_scaling[name],
                self._dropout(name),
                self.bone_exact[name],
            )
            for name in adapter_names
            if name in self.bone_block
        ]

    def _updates_by_row(self, x: Tensor, adapter_names: Sequence[str]) -> list[Update]:
        self._refuse_rows_while_merged()
        names = AdapterNames.of(adapter_names)
        if len(x) != len(names):
            raise ValueError(
                f"Length of `adapter_names` should be the same as the number of inputs, but got {len(names)} and "
                f"{len(x)} respectively."
            )
        present = [name for name in names.rows if name in self.bone_block]
        return [update._replace(rows=names.rows[name]) for name, update in zip(present, self.updates(present), strict=True)]

    def _unmerge_disabled(self) -> None:
        if self.merged:
            with onload_layer(self):  # for a base layer that accelerate offloaded, and with it the merged weight
                self.unmerge()

    def _refuse_rows_while_merged(self) -> None:
        if self.merged:
            raise ValueError("Cannot pass `adapter_names` when there are merged adapters: call `unmerge_adapter` first.")

    def _dropout(self, name: str) -> nn.Module | None:
        dropout = self.bone_dropout[name] if self.training else None
        return dropout if isinstance(dropout, nn.Dropout) else None

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply the adapter's update by `scale` instead of 1."""
        if adapter in self.bone_scaling:
            self._rescale(adapter, float(scale))

    def scale_layer(self, scale: float) -> None:
        """Multiply the updates of the active adapters by `scale`."""
        for name in self.active_adapters:
            if name in self.bone_scaling:
                self._rescale(name, self.bone_scaling[name] * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer(scale)`; without a scale, go back to 1."""
        for name in self.active_adapters:
            if name in self.bone_scaling:
                self._rescale(name, 1.0 if scale is None else self.bone_scaling[name] / scale)

    def _rescale(self, name: str, scale: float) -> None:
        if name in self.merged_adapters and scale != self.bone_scaling[name]:
            warnings.warn(f"Adapter {name} is merged at its old scale: the new one counts once it is unmerged.", stacklevel=3)
        self.bone_scaling[name] = scale

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Scale * Delta(W) of one adapter, of the frozen W and in its shape, in at least float32."""
        with torch.no_grad():
            weight = self.matrices(self._frozen_weight())
            wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
            theta = self.bone_block[adapter].to(wide.dtype)
            return self.as_stored(self.bone_scaling[adapter] * delta(wide, theta, self.bone_spec[adapter]))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's `convert_to_lora` can take `get_delta_weight` for a Linear's: every variant is W plus an update."""
        return False

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
        merged = self._merged_weight(frozen, adapter_names, safe_merge)
        original = Original(self.get_base_layer(), self.weight_name, frozen)
        try:
            self._put_weight(merged, frozen)
        except Exception:  # a layer that cannot be quantized again, or not in the memory there is
            original.restore(self)
            raise
        if self.exact_unmerge and not self.merged:
            self._original = [original]
        self._merged_updates = self._updates_with_merged(adapter_names)
        self.merged_adapters.extend(adapter_names)

    @torch.no_grad()
    def check_safe_merge(self, adapter_names: Sequence[str]) -> None:
        """Raise the ValueError that `merge` of these adapters with `safe_merge` would raise, and merge nothing."""
        self._merged_weight(self._frozen_weight(), adapter_names, safe_merge=True)

    def _merged_weight(self, frozen: Tensor, adapter_names: Sequence[str], safe_merge: bool) -> Tensor:
        """What `merge` puts in place: these adapters and those that are merged already."""
        updates = self._updates_with_merged(adapter_names)
        if frozen.is_meta or any(update.theta.is_meta for update in updates):
            raise InputError(
                f"Adapter {', '.join(adapter_names)} cannot be merged: its values or those of the base layer are not in memory "
                "(they are on the meta device). Load them first; an offloaded model should be offloaded without "
                "`preload_module_classes`."
            )
        merged = self.as_stored(merge(self.matrices(frozen), _on(frozen.device, updates)))
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {', '.join(adapter_names)} seems to be broken")
        return merged

    def can_be_computed_back(self, adapter_names: Sequence[str]) -> bool:
        """Whether arithmetic could undo their merge: not for BAT adapters of different variants or r."""
        updates = self._updates_with_merged(adapter_names)
        return len({(u.spec.variant, u.spec.r) for u in updates if u.spec.blockwise}) <= 1

    def _updates_with_merged(self, adapter_names: Sequence[str]) -> list[Update]:
        """Those that are merged, as they were merged, and these, which may be trained on meanwhile."""
        new = [u._replace(theta=u.theta.detach().clone(), dropout=None) for u in self.updates(adapter_names)]
        return [*self._merged_updates, *new]

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base weight back as it was before merging, bit for bit (unless merged without `exact_unmerge`).

        Raises:
            ValueError, torch.linalg.LinAlgError: merged without `exact_unmerge`, and arithmetic cannot undo it: BAT adapters of
                different kinds, or a merge that has lost information. It stays merged.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self._original:
            self._original.pop().restore(self)
        else:
            self._put_weight(self._frozen_weight())
        self._merged_updates = []
        self.merged_adapters.clear()

    def keep_original_on_host(self, shared: set[int]) -> None:
        """Move what `merge` kept for unmerging to host memory, unless it is one of the `shared` Parameters (by id)."""
        for original in self._original:
            if id(original.parameter) not in shared:
                original.move_to_host()

    def _frozen_weight(self) -> Tensor:
        """The weight without adapters, as it is stored (dequantized if need be), where and in the dtype in which it is now."""
        now = base_weight(self, self.weight_name)
        if self._original:
            return self._original[0].weight.to(now.device, now.dtype)
        return self.as_stored(unmerge(self.matrices(now), _on(now.device, self._merged_updates))) if self.merged else now

    def _put_weight(self, weight: Tensor, frozen: Tensor | None = None) -> None:
        """Give the base layer another weight, quantized if the layer is; with `frozen`, measure what that costs."""
        if self.quantization_backend is None:
            put_weight(self.get_base_layer(), self.weight_name, weight)
            return
        base: Any = self.get_base_layer()
        self.set_base_weight(weight)
        if self.get_base_layer() is not base:  # HQQ's: PEFT leaves the bias behind
            self.get_base_layer().bias = base.bias
        if frozen is not None:
            error, update = self.get_base_weight().float() - weight.float(), weight.float() - frozen.float()
            self.requantization = (_rms(error), _rms(update))

    def __repr__(self) -> str:
        return "bone." + super().__repr__()


def layers_of(model: nn.Module) -> dict[str, BoneLayer]:
    """The adapted layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BoneLayer)}


def name_without_adapters(name: str) -> str:
    """The name that a module has in the model without adapters."""
    return name.replace(".base_layer", "")


def _on(device: torch.device, updates: Sequence[Update]) -> list[Update]:
    """The updates where the weight is now: what was merged may have been elsewhere."""
    return [update._replace(theta=update.theta.to(device)) for update in updates]


def _rms(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item()
