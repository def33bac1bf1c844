"""`BoneModel`: puts `BoneLinear` in place of the modules a `BoneConfig` names. The rest is PEFT's `BaseTuner`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from peft.utils.constants import TRANSFORMERS_MODELS_TO_MISS_TARGET_MODULES_MAPPING
from peft.utils.error import NoMatchingPeftModuleError
from torch import Tensor, nn

from bonetune.errors import AdapterFileError, BonetuneError, SpecError, TargetError
from bonetune.spec import ShardSpec
from bonetune.tuner.config import BoneConfig
from bonetune.tuner.layer import BoneLayer, BoneLinear


class BoneModel(BaseTuner):
    """A model whose target layers carry adapters of the Bone family (arXiv 2409.15371).

    Args:
        model: the model to adapt; it is changed in place.
        config: a `BoneConfig`.
        adapter_name: the adapter's name.
        low_cpu_mem_usage: create the adapter's tensors on the meta device.

    Raises:
        SpecError: r or mini_r does not fit some of the targeted layers; all of them are named, and the model is unchanged.
        peft.utils.error.NoMatchingPeftModuleError: no module matches; the message lists the Linear layers there are.

    Example:
        >>> model = BoneModel(model, BoneConfig(r=8, target_modules=["q_proj", "v_proj"]), "default")
    """

    prefix = "bone_"
    tuner_layer_cls = BoneLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_MISS_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """`BaseTuner.inject_adapter`, which forgets the adapter again if it fails, and says what could be targeted."""
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except NoMatchingPeftModuleError as error:
            self.peft_config.pop(adapter_name, None)
            raise NoMatchingPeftModuleError(f"{error} {_what_can_be_targeted(model)}") from error
        except BonetuneError:
            self.peft_config.pop(adapter_name, None)
            raise

    def _prepare_model(self, peft_config: BoneConfig, model: nn.Module) -> None:
        """Check every targeted layer before the first one is replaced."""
        _maybe_include_all_linear_layers(peft_config, model)
        misfits: list[tuple[ShardSpec, tuple[int, int], SpecError]] = []
        inside: tuple[str, ...] = ()
        for name, module in model.named_modules():
            if not name or name.startswith(inside or "."):
                continue
            if hasattr(module, "base_layer"):  # a tuner layer, whose own parts are no targets
                inside += (name + ".",)
            if not self._check_target_module_exists(peft_config, name):
                continue
            if not self._can_be_adapted(module):
                raise TargetError(
                    f"Target module {name} ({type(module).__name__}) is not supported. Currently, only `torch.nn.Linear` "
                    "(optionally quantized) is supported: leave it out of `target_modules`, or train it whole through "
                    "`modules_to_save`."
                )
            if not _is_linear(module):
                continue
            spec, shape = peft_config.spec(name), (int(module.out_features), int(module.in_features))  # pyright: ignore[reportArgumentType]  (untyped in nn.Module)
            try:
                spec.check(*shape, where=name)
            except SpecError as error:
                misfits.append((spec, shape, error))
        if len(misfits) == 1:
            raise misfits[0][-1]
        if misfits:
            spec = misfits[0][0]
            alike = [shape for other, shape, _ in misfits if other == spec]
            raise SpecError(
                f"{misfits[0][-1]} {len(misfits)} layers do not fit; {spec.remedy(alike)} would fit "
                f"{'them all' if len(alike) == len(misfits) else f'{len(alike)} of them'}."
            )

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
        if not self._can_be_adapted(target):  # where modules were named by a state dict
            raise TargetError(f"Target module {current_key} ({type(target).__name__}) is not supported.")
        layer = target if isinstance(target, BoneLayer) else BoneLinear(target, **get_quantization_kwargs(self))
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

    def _can_be_adapted(self, module: nn.Module) -> bool:
        frozen = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        quantized = resolve_quantization_backend(frozen, **get_quantization_kwargs(self))
        return isinstance(frozen, nn.Linear) or (quantized is not None and quantized.layer_type == "linear")

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT would drop `adapter_names` in silence, and with it the choice of adapter for each row."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError("Bone does not support `adapter_names`: run each adapter's rows in a batch of their own.")
        yield

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: BoneConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Give a file's tensors the model's names, after checking that they are this adapter's tensors, all of them."""
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        layers = {
            f"{name}.bone_block.{adapter_name}": module
            for name, module in model.named_modules()
            if isinstance(module, BoneLayer) and adapter_name in module.bone_block
        }
        if _is_of_november_2024(config, layers, remapped):
            config.variant = "bat"
            for key, layer in layers.items():
                layer.update_layer(
                    adapter_name,
                    config.spec(key.removesuffix(f".bone_block.{adapter_name}")),
                    dropout=config.bone_dropout,
                    exact=config.exact_update,
                    inference_mode=config.inference_mode,
                )
        _check_tensors(config, adapter_name, layers, remapped, known=set(model.state_dict()))
        return remapped


def _is_linear(module: nn.Module) -> bool:
    frozen = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return isinstance(frozen, nn.Linear)


def _what_can_be_targeted(model: nn.Module) -> str:
    names = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if name and _is_linear(module)}
    names = {name for name in names if not name.isdigit()} or names
    return f"The model has Linear layers named {', '.join(sorted(names))}." if names else "The model has no Linear layer."


def _is_of_november_2024(config: BoneConfig, layers: dict[str, BoneLayer], tensors: dict[str, Tensor]) -> bool:
    """PEFT's development version of November 2024 wrote bat as `init_weights: true` with three-dimensional blocks."""
    found = [tensors[key] for key in layers if key in tensors]
    return not config.variant_was_named and config.variant == "bone" and bool(found) and all(t.dim() == 3 for t in found)


def _check_tensors(
    config: BoneConfig, adapter_name: str, layers: dict[str, BoneLayer], tensors: dict[str, Tensor], known: set[str]
) -> None:
    """Raise `AdapterFileError` naming every tensor that is missing, unexpected or of another shape."""
    wrong = [f"{key} is missing" for key in layers if key not in tensors]
    known |= set(layers)
    wrong += [
        f"{key} is not expected"
        for key in tensors
        # PEFT's wrappers of whole modules write names that no module has (with bias="all") and pass over them in loading
        if not {key, key.removeprefix("base_model.model.")} & known and ".modules_to_save." not in key
    ]
    for key, layer in layers.items():
        expected = layer.bone_spec[adapter_name].shape(layer.out_features, layer.in_features)
        if key in tensors and tuple(tensors[key].shape) != expected:
            wrong.append(f"{key} has shape {tuple(tensors[key].shape)}, {config.variant} needs {expected}")
    if wrong:
        raise AdapterFileError(
            f"The adapter's tensors do not fit its configuration (variant {config.variant!r}, r={config.r}) and this model: "
            f"{'; '.join(wrong)}."
        )
