"""`BoneModel`: puts Bone layers in place of the modules a `BoneConfig` names. The rest is PEFT's `BaseTuner`."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers
from peft.utils import get_quantization_kwargs
from peft.utils.constants import (
    DUMMY_TARGET_MODULES,
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    TRANSFORMERS_MODELS_TO_MISS_TARGET_MODULES_MAPPING,
)
from peft.utils.error import NoMatchingPeftModuleError
from torch import Tensor, nn

from bonetune.errors import BonetuneError, InputError
from bonetune.tuner.config import BoneConfig
from bonetune.tuner.dequantize import dequantize_layers, forget_quantization, keep_readable
from bonetune.tuner.embedding import BoneEmbedding
from bonetune.tuner.held import list_rightly
from bonetune.tuner.layer import BoneLayer, layers_of
from bonetune.tuner.loading import check_tensors, is_of_november_2024
from bonetune.tuner.merges import (
    all_or_none,
    refuse_what_cannot_be_undone,
    refuse_what_is_not_finite,
    warn_of_requantization,
)
from bonetune.tuner.mixed_batch import adapters_by_row
from bonetune.tuner.parameter import ParamWrapper
from bonetune.tuner.targets import (
    call_adapted_layers,
    check_targets,
    find_targets,
    layer_class,
    never_called,
    what_can_be_targeted,
)
from bonetune.tuner.tying import (
    check_ties,
    keeping_ties,
    tie_adapter,
    tie_modules_to_save,
    tie_targets,
    warning_of_parted_embeddings,
)
from bonetune.tuner.weighted import COMBINATIONS, combine, combined_config
from bonetune.tuner.whole_parameters import (
    WholeParameter,
    check_whole_parameters,
    forget_unused,
    load_whole_parameters,
    named_as_in_the_model,
    refuse_offloaded,
    refuse_rows,
    refuse_several,
    refuse_whole_parameters_that_are_not_finite,
    saved_parameters,
    train_whole_parameters,
    whole_parameters_of,
    widen_whole_parameters,
)


class BoneModel(BaseTuner):
    """A model whose target layers carry adapters of the Bone family (arXiv 2409.15371).

    Args:
        model: the model to adapt; it is changed in place.
        peft_config: a `BoneConfig`.
        adapter_name: the adapter's name.
        low_cpu_mem_usage: create the adapter's tensors on the meta device.
        state_dict: an adapter's tensors; the modules that they name are adapted, instead of those that the configuration names.

    Raises:
        SpecError: r or mini_r does not fit some of the targeted layers; all of them are named, and the model is unchanged.
        TargetError: a targeted module cannot be adapted; the model is unchanged.
        InputError: a parameter of `trainable_parameters` is not there, or cannot be trained whole; the model is unchanged.
        peft.utils.error.NoMatchingPeftModuleError: no module matches; the message lists the Linear layers there are.

    Example:
        >>> model = BoneModel(model, BoneConfig(r=8, target_modules=["q_proj", "v_proj"]), "default")
    """

    prefix = "bone_"
    tuner_layer_cls: Any = (BoneLayer, WholeParameter)
    target_module_mapping = TRANSFORMERS_MODELS_TO_MISS_TARGET_MODULES_MAPPING
    # the modules that a file names, where it chooses what is adapted
    _named: set[str] | None = None
    # modules that have more than one name, by id
    _shared: frozenset[int] | set[int] = frozenset()
    # what `call_adapted_layers` changed: module, attribute, value before
    _slow_paths: tuple[tuple[nn.Module, str, Any], ...] = ()

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """`BaseTuner.inject_adapter`, which forgets the adapter again if it fails, and says what could be targeted.

        Args:
            model: the model to adapt.
            adapter_name: a key of `peft_config`.
            autocast_adapter_dtype: keep adapters in float32 where the base is narrower.
            low_cpu_mem_usage: create the adapter's tensors on the meta device.
            state_dict: an adapter's tensors; the modules that they name are adapted.

        Raises:
            SpecError, TargetError, InputError, peft.utils.error.NoMatchingPeftModuleError: as the class.
        """
        names = (key.removeprefix("_orig_mod.").rsplit(f".{self.prefix}", 1)[0] for key in state_dict or ())
        self._named = None if state_dict is None else set(names)
        others = [p for layer in whole_parameters_of(model).values() for p in layer.whole.values()]
        trained = [(parameter, parameter.requires_grad) for parameter in others]
        config: Any = self.peft_config[adapter_name]
        try:
            with _no_targets_allowed(config):
                super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        except NoMatchingPeftModuleError as error:
            self.peft_config.pop(adapter_name, None)
            raise NoMatchingPeftModuleError(f"{error} {what_can_be_targeted(model)}") from error
        except BonetuneError:
            self.peft_config.pop(adapter_name, None)
            raise
        train_whole_parameters(model, config, adapter_name, on_meta=low_cpu_mem_usage)
        for layer in whole_parameters_of(model).values():
            if adapter_name in layer.whole:
                layer.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        self._slow_paths = (*self._slow_paths, *call_adapted_layers(model))
        keep_readable(model)

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        for name, other in self.peft_config.items():
            theirs = set(getattr(other, "target_parameters", None) or ())
            if config.target_parameters and theirs and set(config.target_parameters) != theirs:
                # their tensors are told apart by how the wrappers are nested alone
                raise InputError(
                    f"All adapters of a model that target parameters have to target the same ones: {name} has "
                    f"{sorted(theirs)}, the new one {sorted(config.target_parameters)}."
                )

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None and model_config["model_type"] not in self.target_module_mapping:
            if peft_config.target_parameters:
                return peft_config
            raise InputError(
                f"There are no default target modules for models of type {model_config['model_type']!r}: specify "
                "`target_modules`, for instance 'all-linear'."
            )
        return super()._prepare_adapter_config(peft_config, model_config)

    def _prepare_model(self, peft_config: BoneConfig, model: nn.Module) -> None:
        """Check every target before the first one is replaced."""
        everything = str(peft_config.target_modules).lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND
        _maybe_include_all_linear_layers(peft_config, model)
        if everything:
            peft_config.target_modules = set(peft_config.target_modules or ()) - never_called(model)
        if (named := self._named) is None:
            targets, self._shared = find_targets(model, lambda name: bool(self._check_target_module_exists(peft_config, name)))
        else:
            targets, self._shared = find_targets(model, named.__contains__)
        check_ties(model, peft_config, targets)
        check_targets(model, targets, peft_config, get_quantization_kwargs(model))
        check_whole_parameters(model, peft_config, targets)

    def _create_and_replace(
        self,
        peft_config: BoneConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        quantization = get_quantization_kwargs(self)
        if parameter_name is not None:
            there = isinstance(target, ParamWrapper) and target.parameter_name == parameter_name
            layer: Any = target if there else ParamWrapper(target, parameter_name, **quantization)
        elif isinstance(target, BoneLayer):
            layer = target
        else:
            cls = layer_class(target, quantization)
            assert cls is not None, current_key  # `_prepare_model` has checked all targets
            layer = cls(target, **quantization)
        layer.update_layer(
            adapter_name,
            peft_config.spec(current_key),
            zeros=bool(peft_config.init_weights),
            dropout=peft_config.bone_dropout,
            exact=peft_config.exact_update,
            inference_mode=peft_config.inference_mode,
            where=current_key,
        )
        if layer is not target:
            layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)  # a further adapter is not trained until it is made active
            self._replace_module(parent, target_name, layer, target)
        if self._check_tied_module_exists(peft_config, current_key):
            tie_adapter(self.model, peft_config, adapter_name)

    _create_and_replace_parameter = _create_and_replace

    def _check_merge_allowed(self) -> None:
        """Allowed: PEFT warns here of tied weights, which merging into a Parameter of its own never changes."""

    def _add_targets_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        tie_targets(self.model, peft_config, tied_weight_keys)

    def _add_modules_to_save_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        tie_modules_to_save(self.model, peft_config, tied_weight_keys)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Replace a module under all of its names: shared modules stay shared."""
        if isinstance(new_module, BoneLayer):
            super()._replace_module(parent, child_name, new_module, child)
        else:  # unloading: what was under the child comes back as it is
            setattr(parent, child_name, new_module)
        if id(child) not in self._shared:
            return
        self._shared = {*self._shared, id(new_module)}
        for module in self.model.modules():
            if module is not new_module:
                for name in [name for name, inner in module._modules.items() if inner is child]:
                    setattr(module, name, new_module)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters active.

        Args:
            adapter_name: one or several.
            inference_mode: leave their tensors frozen.

        Raises:
            InputError: several of them train the same parameter whole; nothing is changed.
        """
        refuse_several(self.model, adapter_name)
        super().set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; where it was the only active one, the first of the others becomes active.

        Raises:
            ValueError: there is none of that name, or it is merged.
        """
        whole, active = whole_parameters_of(self.model), self.active_adapters
        super().delete_adapter(adapter_name)
        forget_unused(self.model)
        if whole and adapter_name in active and self.peft_config:
            # each layer has chosen among the adapters that it has itself
            self.set_adapter([name for name in active if name != adapter_name] or sorted(self.peft_config)[:1])

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False, *, exact_unmerge: bool = True
    ) -> None:
        """Add adapters' updates to the base weights: in float32, from the frozen weights, rounded once.

        Args:
            adapter_names: adapters to merge; None merges the active ones.
            safe_merge: refuse a result with NaN or infinity, before any weight is touched.
            exact_unmerge: keep the weights as they were in host memory (outside any state dict), so that `unmerge_adapter`
                restores every bit. False keeps nothing; unmerging then computes the weights back, up to rounding.

        Raises:
            ValueError: `safe_merge` found a value that is not finite; or, without `exact_unmerge`, several BAT adapters of
                different kinds, whose merge arithmetic cannot undo.
            InputError: several adapters train the same parameter whole.

        Warns:
            UserWarning: quantized weights were rounded to their codes again; with the measured error.
        """
        layers, whole = layers_of(self.model), whole_parameters_of(self.model)
        refuse_what_cannot_be_undone(layers, adapter_names, exact_unmerge=exact_unmerge)
        for parameter in whole.values():
            parameter.refuse_several([*parameter.merged_adapters, *(adapter_names or self.active_adapters)])
        if safe_merge:
            refuse_what_is_not_finite(layers, adapter_names)
            refuse_whole_parameters_that_are_not_finite(self.model, adapter_names)
        for layer in layers.values():
            layer.exact_unmerge = exact_unmerge
        undone: dict[str, Any] = {**layers, **whole}
        with all_or_none(undone), keeping_ties([*layers.values()]):
            super().merge_adapter(adapter_names, safe_merge)
        # what was kept is no longer in the model, unless another layer is tied to it
        shared = {id(parameter) for parameter in self.model.parameters()}
        for layer in layers.values():
            layer.keep_original_on_host(shared)
        warn_of_requantization(layers)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        *,
        dequantize: bool = False,
    ) -> nn.Module:
        """Merge the adapters into the base model and return it without them.

        Args:
            progressbar: show one.
            safe_merge: refuse a result with NaN or infinity, before any weight is touched.
            adapter_names: adapters to merge; None merges the active ones.
            dequantize: turn quantized layers (all of the model's) into plain ones first, so that the merged weights are what
                was trained: dequantized values and update. Otherwise they are rounded to codes again, which may lose much of
                the update.

        Returns:
            The base model; it is the model that was adapted, changed in place.

        Raises:
            ValueError: `safe_merge` found a value that is not finite.
            InputError: several adapters train the same parameter whole.

        Warns:
            UserWarning: quantized weights were rounded to their codes again; with the measured error.
        """
        layers, whole = layers_of(self.model), whole_parameters_of(self.model)
        for parameter in whole.values():
            parameter.refuse_several([*parameter.merged_adapters, *(adapter_names or self.active_adapters)])
        if safe_merge:
            refuse_what_is_not_finite(layers, adapter_names)
            refuse_whole_parameters_that_are_not_finite(self.model, adapter_names)
        plain, dtype = [], getattr(self.model, "dtype", None)
        if dequantize and any(layer.merged for layer in layers.values()):
            raise ValueError("Some adapters are merged into quantized weights already: call `unmerge_adapter` first.")
        undone: dict[str, Any] = {**whole}
        with all_or_none(undone):
            for parameter in whole.values():
                parameter.merge(adapter_names=adapter_names)
            if dequantize:
                plain = dequantize_layers(self.model)
                forget_quantization(self.model)
        for layer in layers.values():
            layer.exact_unmerge = False
        tied = self.get_model_config(self.model).get("tie_word_embeddings")
        with warning_of_parted_embeddings(self.model), warnings.catch_warnings(), keeping_ties([*layers.values()]):
            if any(getattr(config, "ensure_weight_tying", False) for config in self.peft_config.values()):
                warnings.filterwarnings("ignore", "Input and output embeddings are no longer tied")  # for a moment
            merged: Any = super().merge_and_unload(progressbar, safe_merge, adapter_names)
        head = merged.get_output_embeddings() if tied else None
        if head is not None and head.weight is merged.get_input_embeddings().weight:
            merged.config.tie_word_embeddings = True
        for module in plain:
            module.to(dtype)
        warn_of_requantization(layers)
        return merged

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: Literal["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"] = "linear",
        *,
        density: float | None = None,
        majority_sign_method: Literal["total", "frequency"] = "total",
    ) -> None:
        """Add a new adapter that is a combination of others of equal variant and r.

        Delta(W) is linear in the trainable tensor, so `linear` is the exact sum of the scaled updates, BAT included. The others
        prune the tensors first, as PEFT does LoRA's factors; see `peft.utils.merge_utils`.

        Args:
            adapters: names of the adapters to combine.
            weights: a factor for each, of any sign; an adapter's own scale multiplies it.
            adapter_name: the new adapter's name. It is not made active.
            combination_type: how to combine.
            density: share of the values that is kept, for all but `linear`.
            majority_sign_method: how the sign of a value is elected, for `ties` and `dare_ties`.

        Raises:
            InputError: unknown adapters or combination type, a name that is taken, adapters of different variants or r on a
                layer, that target parameters, or that train biases, whole modules or whole parameters.

        Example:
            >>> model.add_weighted_adapter(["maths", "code"], [0.7, 0.3], "both")
            >>> model.set_adapter("both")
        """
        if adapter_name in self.peft_config:
            raise InputError(f"An adapter named {adapter_name} is there already: choose another name, or delete it first.")
        if combination_type not in COMBINATIONS:
            raise InputError(
                f"Unknown combination_type {combination_type!r}: choose one of {', '.join(COMBINATIONS)}. (LoRA's `cat` and "
                "`svd` rearrange factors, which this update has none of; `linear` is exact here.)"
            )
        if combination_type != "linear" and not (isinstance(density, int | float) and 0 < density <= 1):
            raise InputError(f"combination_type={combination_type!r} needs a `density` above 0 and at most 1, got {density!r}.")
        if majority_sign_method not in ("total", "frequency"):
            raise InputError(f"Unknown majority_sign_method {majority_sign_method!r}: choose 'total' or 'frequency'.")
        self.peft_config[adapter_name] = combined_config(self.model, self.peft_config, adapters, weights)
        self.inject_adapter(self.model, adapter_name)
        settings = {"density": density, "majority_sign_method": majority_sign_method}
        combine(self.model, adapters, weights, adapter_name, combination_type, **settings)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        refuse_rows(self.model, names)
        beams = kwargs.get("num_beams")
        with adapters_by_row(self.model, names, beams if isinstance(beams, int) else None):
            yield

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        unloaded = super()._unload_and_optionally_merge(*args, **kwargs)
        for parameter in whole_parameters_of(self.model).values():
            parameter.unload()
        for module, name, value in self._slow_paths:
            setattr(module, name, value)
        return unloaded

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """PEFT calls this when it has loaded an adapter, and offloaded it if the base is."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in layers_of(self.model).values():
            list_rightly(layer.bone_block, adapter_name)
        tie_adapter(self.model, self.peft_config[adapter_name], adapter_name)
        refuse_offloaded(self.model, adapter_name)
        if autocast_adapter_dtype:
            widen_whole_parameters(self.model, adapter_name)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> Any:
        for name, layer in layers_of(model).items():
            if isinstance(layer, BoneEmbedding) and layer.merged and adapter_name in layer.bone_block:
                raise InputError(
                    f"{name} has adapters merged, and PEFT would write its merged weight into the adapter's file, to be "
                    "updated again when it is loaded: call `unmerge_adapter` before saving."
                )
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, *args, **kwargs)
        return selected | saved_parameters(model, adapter_name, state_dict)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """The name in a file; an adapter's name that is also a module's stays."""
        return key.removesuffix(f".{adapter_name}") if key.endswith(f".bone_block.{adapter_name}") else key

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: BoneConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Give a file's tensors the model's names, after checking that they are this adapter's tensors, all of them."""
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        remapped = named_as_in_the_model(model, adapter_name, remapped)
        whole = whole_parameters_of(model)
        own = {name: layer.base.shape for name, layer in whole.items() if adapter_name in layer.whole}
        layers = {
            f"{name}.bone_block.{adapter_name}": layer
            for name, layer in layers_of(model).items()
            if adapter_name in layer.bone_block
        }
        if is_of_november_2024(config, [remapped[key] for key in layers if key in remapped]):
            config.variant = "bat"
            for key, layer in layers.items():
                layer.update_layer(
                    adapter_name,
                    config.spec(key.removesuffix(f".bone_block.{adapter_name}")),
                    dropout=config.bone_dropout,
                    exact=config.exact_update,
                    inference_mode=config.inference_mode,
                )
        known = set(model.state_dict()) - (whole.keys() - own.keys())
        check_tensors(config, adapter_name, layers, remapped, known=known, whole=own)
        return load_whole_parameters(model, adapter_name, remapped)


@contextmanager
def _no_targets_allowed(config: BoneConfig) -> Iterator[None]:
    """Within it, PEFT does not miss the modules of an adapter that trains whole parameters alone."""
    if config.adapts_layers:
        yield
        return
    targets, config.target_modules = config.target_modules, DUMMY_TARGET_MODULES
    try:
        yield
    finally:
        config.target_modules = targets
