"""Parameters of the base model that an adapter trains whole (`trainable_parameters`), each in the place of the base's own."""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bonetune.errors import InputError
from bonetune.tuner.config import BoneConfig
from bonetune.tuner.layer import layers_of, name_without_adapters
from bonetune.tuner.targets import targeted_parameters

_HALF = (torch.bfloat16, torch.float16)
# What PEFT puts before the names of a model's tensors, and FSDP within them.
_PREFIX, _WRAPPED = "base_model.model.", "_fsdp_wrapped_module."
# Modules that call each of their children, or are gone through by those who hold them.
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class WholeParameter(nn.Module, BaseTunerLayer):
    """A parameter of the base model with the values that adapters have for it.

    It is a child of the module that has the parameter, so that PEFT finds it and `.to()` moves what it keeps, but has no
    parameters itself: names and state dicts stay the base model's. In the parameter's place is that of the adapter that is
    active (or merged), or else the base's own, which nothing writes to.

    Args:
        owner: the module that has the parameter.
        name: the parameter's name in it.
    """

    adapter_layer_names = ("whole",)
    # A PEFT layer has those of its base layer, and this has none.
    weight: Any = None
    bias: Any = None
    owner: nn.Module

    def __init__(self, owner: nn.Module, name: str) -> None:
        super().__init__()
        vars(self)["owner"] = owner  # not a child: it is the parent
        self.parameter_name = name
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []
        # By adapter, and the base's own under None; what is in place may have been replaced there meanwhile.
        self._kept: dict[str | None, nn.Parameter] = {None: getattr(owner, name)}
        self._in_place: str | None = None

    @property
    def whole(self) -> dict[str, nn.Parameter]:
        """The adapters' parameters by name."""
        return {name: parameter for name, parameter in self._up_to_date().items() if name is not None}

    @property
    def base(self) -> nn.Parameter:
        """The base model's own parameter."""
        return self._up_to_date()[None]

    @property
    def in_place(self) -> str | None:
        """The adapter whose parameter the model has now; None: its own."""
        return self._in_place

    @property
    def now(self) -> nn.Parameter:
        """The parameter that the model has."""
        return self._up_to_date()[self._in_place]

    def add(self, adapter_name: str, *, on_meta: bool = False) -> None:
        """Give an adapter a parameter with the base's values; or none yet, on the meta device."""
        base = self.base.detach()
        self._kept[adapter_name] = nn.Parameter(torch.empty_like(base, device="meta") if on_meta else base.clone())

    def put(self, adapter_name: str, values: Tensor) -> None:
        """Give an adapter's parameter other values, in its own dtype; in place, unless it is on the meta device."""
        parameter = self.whole[adapter_name]
        if parameter.is_meta:
            self._replace(adapter_name, values.detach().to(self.base.device, parameter.dtype, copy=True))
        else:
            with torch.no_grad():
                parameter.copy_(values)

    def widen(self, adapter_name: str) -> None:
        """Make an adapter's parameter float32 if it is narrower."""
        if adapter_name in self.whole and self.whole[adapter_name].dtype in _HALF:
            self._replace(adapter_name, self.whole[adapter_name].detach().float())

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self.refuse_several(names)
        super().set_adapter(names, inference_mode)
        self._settle()

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled:
            self.merged_adapters.clear()
        super().enable_adapters(enabled)
        self._settle()

    def delete_adapter(self, adapter_name: str) -> None:
        self._active_adapter = [name for name in self.active_adapters if name != adapter_name]
        self.merged_adapters = [name for name in self.merged_adapters if name != adapter_name]
        self._settle()
        self._kept.pop(adapter_name, None)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Have the adapter's parameter in place until `unmerge`, whichever adapter is active."""
        names: Sequence[str] = self.active_adapters if adapter_names is None else adapter_names
        new = [name for name in names if name in self.whole and name not in self.merged_adapters]
        self.refuse_several([*self.merged_adapters, *new])
        self.merged_adapters.extend(new)
        self._settle()

    def unmerge(self) -> None:
        self.merged_adapters.clear()
        self._settle()

    def unload(self) -> None:
        """Leave the merged adapter's parameter in place, in the base's dtype, or else the base's own; both frozen."""
        merged = [self.whole[name] for name in self.merged_adapters]
        self._active_adapter, self.merged_adapters = [], []
        self._settle()
        if merged:
            setattr(self.owner, self.parameter_name, nn.Parameter(merged[0].detach().to(self.base), requires_grad=False))
        delattr(self.owner, _child_name(self.parameter_name))

    def refuse_several(self, adapter_names: Iterable[str]) -> None:
        """Raise InputError if more than one of these adapters has the parameter."""
        if len(several := [name for name in dict.fromkeys(adapter_names) if name in self._kept]) > 1:
            raise InputError(
                f"Adapters {', '.join(several)} train {self.parameter_name} of a {type(self.owner).__name__} whole, and whole "
                "parameters have no sum: activate (or merge) one of them at a time."
            )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def _get_available_adapters(self) -> set[str]:
        return set(self.whole)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Nothing: `put` has done it, and PEFT would take an adapter's dtype from the base."""

    def _up_to_date(self) -> dict[str | None, nn.Parameter]:
        """What is kept, after a look at what is in place."""
        now = self.owner._parameters.get(self.parameter_name)
        if now is not None:
            self._kept[self._in_place] = now
        return self._kept

    def _replace(self, adapter_name: str, values: Tensor) -> None:
        new = nn.Parameter(values, requires_grad=self.whole[adapter_name].requires_grad)
        self._kept[adapter_name] = new
        if self._in_place == adapter_name:
            setattr(self.owner, self.parameter_name, new)

    def _settle(self) -> None:
        """Put in place what should be there now."""
        names = [] if self.disable_adapters else self.merged_adapters or self.active_adapters
        wanted = next((name for name in names if name in self._kept), None)
        kept = self._up_to_date()
        if wanted == self._in_place:
            return
        now, coming = self.now, kept[wanted]
        if isinstance(now, DTensor) and not isinstance(coming, DTensor):
            raise InputError(
                f"Parameter {self.parameter_name} of {type(self.owner).__name__} is sharded by FSDP with the values of one "
                "adapter, and cannot be exchanged for the base's or another's: disable or switch adapters before sharding."
            )
        if coming.device != now.device and not (coming.is_meta or now.is_meta):
            coming = kept[wanted] = nn.ParameterList([coming]).to(now.device)[0]
        setattr(self.owner, self.parameter_name, coming)
        self._in_place = wanted

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "WholeParameter":
        """Move or convert what is not in place as well: the rest of `nn.Module` sees it for as long as this takes."""
        away = {name: parameter for name, parameter in self._up_to_date().items() if name != self._in_place}
        self._parameters.update({str(number): parameter for number, parameter in enumerate(away.values())})
        try:
            super()._apply(fn, recurse)
            for name, parameter in zip(away, self._parameters.values(), strict=True):
                assert parameter is not None
                self._kept[name] = parameter
        finally:
            self._parameters.clear()
        return self

    def __repr__(self) -> str:
        return f"bone.WholeParameter({self.parameter_name}: {', '.join(self.whole)})"


def whole_parameters_of(model: nn.Module) -> dict[str, WholeParameter]:
    """The parameters that adapters train whole, by the names that the model has for them."""
    return {
        f"{name.rpartition('.')[0]}.{module.parameter_name}".lstrip(".").replace(_WRAPPED, ""): module
        for name, module in model.named_modules()
        if isinstance(module, WholeParameter)
    }


def check_whole_parameters(model: nn.Module, config: BoneConfig, targets: Iterable[str]) -> None:
    """Raise one error for what cannot be trained whole, before anything is changed.

    Args:
        model: the base model, adapted by others or not.
        config: the new adapter's.
        targets: names of the modules that it adapts.

    Raises:
        InputError: a name that no parameter has; one that is adapted, tied to another, quantized, offloaded, in a module that
            is saved whole, or held by a container of modules.
    """
    new = _matching(model, config)
    saved = {name for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)}
    owners: dict[int, dict[str, nn.Module]] = {}
    for name, (owner, parameter_name) in _parameters(model):
        owners.setdefault(id(owner._parameters[parameter_name]), {})[name] = owner
    for name, (owner, parameter_name) in new.items():
        if reason := _reason_against(model, name, owner, parameter_name, config):
            raise InputError(f"{name} cannot be trained whole: {reason} Leave it out of `trainable_parameters`.")
        names = owners[id(owner._parameters[parameter_name])]
        if tied := [other for other, module in names.items() if module is not owner]:
            raise InputError(
                f"{name} cannot be trained whole: it is one with {', '.join(tied)}. Leave it out of `trainable_parameters`, or "
                "untie them."
            )
    whole = {*new, *(name_without_adapters(name) for name in whole_parameters_of(model))}
    adapted = {f"{name_without_adapters(name)}.{layer.weight_name}" for name, layer in layers_of(model).items()}
    adapted |= {f"{name_without_adapters(name)}.weight" for name in targets}
    adapted |= {name for name, _, _ in targeted_parameters(model, config)}
    if both := sorted(whole & adapted):
        raise InputError(
            f"{both[0]} ({len(both)} such) is adapted, and cannot be trained whole beside that: leave it out of "
            "`trainable_parameters`, or its module out of `target_modules`."
        )
    for name in sorted(whole):
        modules = _modules_around(name)
        key = next((key for key in config.modules_to_save or () if any(module.endswith(key) for module in modules)), None)
        if key is not None or saved & set(modules):
            raise InputError(
                f"{name} cannot be trained whole by itself: its module is (`modules_to_save`). Leave it out of "
                "`trainable_parameters`, or its module out of `modules_to_save`."
            )


def train_whole_parameters(model: nn.Module, config: BoneConfig, adapter_name: str, *, on_meta: bool = False) -> None:
    """Give a new adapter parameters of its own for those that its configuration names; none of them is made active.

    Args:
        model: the base model; `check_whole_parameters` has passed it.
        config: the adapter's.
        adapter_name: its name.
        on_meta: leave the values to be loaded.
    """
    for owner, parameter_name in _matching(model, config).values():
        child = _child_name(parameter_name)
        if child not in owner._modules:
            owner.add_module(child, WholeParameter(owner, parameter_name))
        layer: Any = owner._modules[child]
        layer.base.requires_grad_(False)
        layer.add(adapter_name, on_meta=on_meta)


def widen_whole_parameters(model: nn.Module, adapter_name: str) -> None:
    """Train in float32 what a model in half precision takes in float32: where its class says `takes_float32_parameters`."""
    takes = [module for module in model.modules() if getattr(type(module), "takes_float32_parameters", False)]
    for layer in {inner for module in takes for inner in module.modules() if isinstance(inner, WholeParameter)}:
        layer.widen(adapter_name)


def refuse_offloaded(model: nn.Module, adapter_name: str) -> None:
    """Raise InputError where accelerate keeps a whole parameter elsewhere: it would load one adapter's values for all."""
    for name, layer in whole_parameters_of(model).items():
        if adapter_name in layer.whole and _is_offloaded(layer.owner, layer.now):
            raise InputError(
                f"{name} is trained whole by adapter {adapter_name}, and its module is offloaded: leave the module out of the "
                "offloading (`device_map`)."
            )


def refuse_several(model: nn.Module, adapter_names: str | Sequence[str]) -> None:
    """Raise InputError if more than one of these adapters trains the same parameter whole."""
    for layer in whole_parameters_of(model).values():
        layer.refuse_several([adapter_names] if isinstance(adapter_names, str) else adapter_names)


def refuse_rows(model: nn.Module, adapter_names: Sequence[str]) -> None:
    """Raise ValueError where rows of one batch would need different values of one parameter."""
    for name, layer in whole_parameters_of(model).items():
        owners = [*dict.fromkeys(adapter for adapter in (layer.in_place, *adapter_names) if adapter in layer.whole)]
        if owners:
            raise ValueError(
                f"Rows of one batch cannot have different adapters on {name}, which {', '.join(owners)} trains whole: run each "
                "adapter's rows in a batch of their own."
            )


def refuse_whole_parameters_that_are_not_finite(model: nn.Module, adapter_names: Sequence[str] | None) -> None:
    """Raise the ValueError of a `safe_merge` for whole parameters."""
    for name, layer in whole_parameters_of(model).items():
        for adapter in layer.active_adapters if adapter_names is None else adapter_names:
            if adapter in layer.whole and not bool(torch.isfinite(layer.whole[adapter]).all()):
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken: {name} would not be "
                    "finite."
                )


def forget_unused(model: nn.Module) -> None:
    """Remove what is left of parameters that no adapter trains any more."""
    for layer in whole_parameters_of(model).values():
        if not layer.whole:
            layer.unload()


def saved_parameters(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's whole parameters as they are saved, by their names in the model.

    Args:
        model: the model, in PEFT's wrapper or not.
        adapter_name: whose.
        state_dict: the model's, which may have been gathered from shards: what is in place is taken from it.
    """
    return {
        name: state_dict[name] if layer.in_place == adapter_name and name in state_dict else layer.whole[adapter_name].detach()
        for name, layer in whole_parameters_of(model).items()
        if adapter_name in layer.whole
    }


def named_as_in_the_model(model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors, those of the adapter's whole parameters by the names that the model has for them."""
    names = {
        name_without_adapters(name).removeprefix(_PREFIX): name
        for name, layer in whole_parameters_of(model).items()
        if adapter_name in layer.whole
    }
    return {names.get(name_without_adapters(name).removeprefix(_PREFIX), name): tensor for name, tensor in tensors.items()}


def load_whole_parameters(model: nn.Module, adapter_name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Load an adapter's whole parameters, in place or not; return the rest, for PEFT to load (what is in shards, too)."""
    rest = dict(tensors)
    for name, layer in whole_parameters_of(model).items():
        if adapter_name in layer.whole and not isinstance(layer.whole[adapter_name], DTensor):
            layer.put(adapter_name, rest.pop(name))
    return rest


def _matching(model: nn.Module, config: BoneConfig) -> dict[str, tuple[nn.Module, str]]:
    """The parameters that a configuration names: module and parameter's name, by the (first) name in the base model."""
    wanted = config.trainable_parameters
    if not wanted:
        return {}
    named = list(_parameters(model))
    if isinstance(wanted, str):
        found = [(name, place) for name, place in named if re.fullmatch(wanted, name)]
        if not found:
            raise InputError(
                f"`trainable_parameters`={wanted!r} is a regular expression that matches no parameter's whole name"
                f"{_near(wanted, [name for name, _ in named])}."
            )
    else:
        for end in wanted:
            if not any(_ends(name, end) for name, _ in named):
                parts = end.count(".") + 1
                known = {".".join(name.split(".")[-parts:]) for name, _ in named}
                raise InputError(
                    f"`trainable_parameters` has {end!r}, which no parameter's name is or ends with{_near(end, sorted(known))}."
                )
        found = [(name, place) for name, place in named if any(_ends(name, end) for end in wanted)]
    first = {place: name for name, place in reversed(named)}
    return {first[place]: place for _, place in found}


def _parameters(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
    """Each of the base model's parameters by each of its names in it: module and parameter's name."""
    inside: tuple[str, ...] = ()
    for module_name, module in model.named_modules(remove_duplicate=False):
        if module_name.startswith(inside or "."):
            continue
        if isinstance(module, BaseTunerLayer):
            inside += tuple(f"{module_name}.{name}" for name in vars(module)["_modules"] if name != "base_layer")
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{name_without_adapters(module_name)}.{name}".lstrip("."), (module, name)


def _reason_against(model: nn.Module, name: str, owner: nn.Module, parameter_name: str, config: BoneConfig) -> str | None:
    """Why the parameter itself cannot be trained whole."""
    parameter = owner._parameters[parameter_name]
    assert parameter is not None
    backend = resolve_quantization_backend(owner, **get_quantization_kwargs(model)) if parameter_name == "weight" else None
    if backend is not None or not parameter.is_floating_point():
        return f"it holds codes ({parameter.dtype}), no floating-point numbers."
    if isinstance(owner, _CONTAINERS):
        return f"it belongs to a {type(owner).__name__} itself, which calls or lists all that is in it."
    if _is_offloaded(owner, parameter):
        return "its module is offloaded."
    if config.trainable_token_indices and isinstance(owner, nn.Embedding):
        return "`trainable_token_indices` trains rows of an embedding."
    return None


def _is_offloaded(owner: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether accelerate keeps it elsewhere between the module's forwards."""
    return parameter.is_meta and hasattr(owner, "_hf_hook")


def _modules_around(name: str) -> list[str]:
    parts = name.split(".")[:-1]
    return [".".join(parts[:number]) for number in range(1, len(parts) + 1)]


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f"; near it are {', '.join(near)}" if near else ""


def _child_name(parameter_name: str) -> str:
    return f"whole_{parameter_name}"
