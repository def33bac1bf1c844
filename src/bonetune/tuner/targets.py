"""Which modules and parameters an adapter can sit on, checked before the first one is replaced."""

from collections.abc import Callable, Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import resolve_quantization_backend
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from bonetune.errors import InputError, SpecError, TargetError
from bonetune.spec import ShardSpec
from bonetune.tuner.config import BoneConfig
from bonetune.tuner.convolution import BoneConv
from bonetune.tuner.dequantize import unreadable
from bonetune.tuner.embedding import BoneEmbedding
from bonetune.tuner.frozen import CONVOLUTIONS
from bonetune.tuner.layer import BoneLayer, layers_of, name_without_adapters
from bonetune.tuner.linear import BoneLinear
from bonetune.tuner.parameter import ParamWrapper


def layer_class(module: nn.Module, quantization: dict[str, Any]) -> type[BoneLayer] | None:
    """The tuner layer for a module (or for what is under another tuner's layer); None if there is none."""
    frozen = _frozen(module)
    if isinstance(frozen, nn.Linear | Conv1D):
        return BoneLinear
    if isinstance(frozen, CONVOLUTIONS):
        # a forward of its own (that pads, or standardizes the weight) would not be the convolution with the merged kernel
        return BoneConv if type(frozen).forward in [cls.forward for cls in CONVOLUTIONS] else None
    if isinstance(frozen, nn.Embedding):
        # nor would it be a lookup, but for the factor that Gemma's has
        scaled = hasattr(frozen, "embed_scale") and frozen._parameters.keys() == {"weight"}
        return BoneEmbedding if scaled or type(frozen).forward is nn.Embedding.forward else None
    backend = resolve_quantization_backend(frozen, **quantization)
    return BoneLinear if backend is not None and backend.layer_type == "linear" else None


def find_targets(model: nn.Module, matches: Callable[[str], bool]) -> tuple[list[str], set[int]]:
    """Names of the modules that match, outside other tuner layers, and the ids of the modules that have several names.

    Raises:
        TargetError: a module of several names, of which the first does not match.
    """
    targets: dict[str, None] = {}
    first_names: dict[int, str] = {}
    shared: set[int] = set()
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules(remove_duplicate=False):
        if not name or name.startswith(inside or "."):
            continue
        if hasattr(module, "base_layer"):  # a tuner layer, whose own parts are no targets
            inside += (name + ".",)
        first = first_names.setdefault(id(module), name)
        if first != name:
            shared.add(id(module))
        if not matches(name) or first in targets:
            continue
        if first != name:
            raise TargetError(
                f"Target module {name} is the same module as {first}: target it by its first name, and both are adapted."
            )
        targets[name] = None
    return list(targets), shared


def check_targets(model: nn.Module, modules: list[str], config: BoneConfig, quantization: dict[str, Any]) -> None:
    """Raise one error for all that is wrong with adapting the named modules, and the parameters of `target_parameters`.

    Raises:
        TargetError: a module of a kind that cannot be adapted, that is never called, or that is split by tensor parallelism.
        SpecError: r or mini_r does not fit some weights.
    """
    misfits: list[tuple[ShardSpec, tuple[int, int], SpecError]] = []
    for name, sides in _all_sides(model, modules, config, quantization):
        spec = config.spec(name)
        try:
            spec.check(*sides, where=name)
        except SpecError as error:
            misfits.append((spec, sides, error))
    if len(misfits) == 1:
        raise misfits[0][-1]
    if misfits:
        spec = misfits[0][0]
        alike = [shape for other, shape, _ in misfits if other == spec]
        raise SpecError(
            f"{misfits[0][-1]} {len(misfits)} layers do not fit; {spec.remedy(alike)} would fit "
            f"{'them all' if len(alike) == len(misfits) else f'{len(alike)} of them'}."
        )


def targeted_parameters(model: nn.Module, config: BoneConfig) -> Iterator[tuple[str, nn.Module, str]]:
    """(full name, module, parameter's name) of each parameter that `target_parameters` names by its end, as PEFT matches."""
    wanted = config.target_parameters
    if not wanted:
        return
    for module_name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            continue
        for name, _ in module.named_parameters(recurse=False):
            full = f"{name_without_adapters(module_name)}.{name}"
            if any(full == target or full.endswith(f".{target}") for target in wanted):
                yield full, module, name


def what_can_be_targeted(model: nn.Module) -> str:
    """A sentence with the names of the model's Linear layers."""
    linear = [name for name, module in model.named_modules() if name and isinstance(_frozen(module), nn.Linear | Conv1D)]
    names = {name.rsplit(".", 1)[-1] for name in linear}
    names = {name for name in names if not name.isdigit()} or names
    return f"The model has Linear layers named {', '.join(sorted(names))}." if names else "The model has no Linear layer."


def never_called(model: nn.Module) -> set[str]:
    """Names of Linear layers whose weight is read instead: an adapter there would change nothing."""
    return {f"{name}.out_proj" for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}


def call_adapted_layers(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """Keep torch's Transformer encoder from its fast path in evaluation, which reads weights instead of calling layers.

    Returns:
        What was changed for that: module, attribute and the value that it had.
    """
    changed = []
    for module in model.modules():
        # "neither ReLU nor GELU" is asked for by the fast path alone
        for kind, name, value in (
            (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
            (nn.TransformerEncoder, "use_nested_tensor", False),
        ):
            if isinstance(module, kind) and getattr(module, name, value) and _holds_an_adapter(module):
                changed.append((module, name, getattr(module, name)))
                setattr(module, name, value)
    return changed


def _all_sides(
    model: nn.Module, modules: list[str], config: BoneConfig, quantization: dict[str, Any]
) -> Iterator[tuple[str, tuple[int, int]]]:
    read = never_called(model)
    for name in modules:
        module = model.get_submodule(name)
        frozen, cls = _frozen(module), layer_class(module, quantization)
        if cls is None:
            raise TargetError(
                f"Target module {name} ({type(frozen).__name__}) is not supported. Currently, only `torch.nn.Linear` "
                "(optionally quantized), `Conv1D` of transformers, `torch.nn.Conv1d`, `Conv2d`, `Conv3d` and "
                "`torch.nn.Embedding` are supported: leave it out of `target_modules`, name its parameters in "
                "`target_parameters`, or train it whole through `modules_to_save`."
            )
        if name in read:
            raise TargetError(
                f"Target module {name} is never called: `torch.nn.MultiheadAttention` reads its weight, so an adapter there "
                "would change nothing. Leave it out of `target_modules`, or train the attention whole through "
                "`modules_to_save`."
            )
        _check_weight(name, frozen, config, quantization)
        yield name, cls.sides(frozen)
    for name, module, parameter in targeted_parameters(model, config):
        if config.bone_dropout:
            raise InputError(
                f"`bone_dropout` cannot be defined for the parameter {name}: what enters its update is not seen. Use 0."
            )
        if name.rpartition(".")[0] in read:
            raise TargetError(f"Parameter {name} cannot be adapted: `torch.nn.MultiheadAttention` never calls its module.")
        yield name, ParamWrapper.sides(module, parameter)


def _check_weight(name: str, frozen: nn.Module, config: BoneConfig, quantization: dict[str, Any]) -> None:
    weight = frozen._parameters.get("weight")
    if isinstance(weight, DTensor) and not set(weight.device_mesh.mesh_dim_names or ()) <= {"fsdp"}:
        raise TargetError(
            f"Target module {name} is split between processes by tensor parallelism, which no variant is defined for: shard "
            "the model by FSDP instead."
        )
    backend = resolve_quantization_backend(frozen, **quantization)
    if backend is not None and config.variant == "bat" and unreadable(frozen, backend):
        raise TargetError(
            f"Variant 'bat' needs the weight's values, which {backend.backend_name} layers ({name}) do not give: use "
            "'bat-row', 'bat-free', 'bat-left' or 'bone'."
        )


def _frozen(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _holds_an_adapter(module: nn.Module) -> bool:
    return bool(layers_of(module))
