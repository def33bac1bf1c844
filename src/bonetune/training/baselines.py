"""Methods besides the family's, for comparisons in one loop: PEFT's LoRA and its relatives, PEFT's MiSS, all weights.

PiSSA, OLoRA, LoRA-GA and MiLoRA begin with an adapter that holds a part of each weight, and take that part out of the base.
What they leave is converted by PEFT to a LoRA of twice the rank on the base as it was; for that, and to go on from a
checkpoint, the adapter that they began with lies in the run's folder.
"""

import difflib
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import (
    LoraConfig,
    LoraGAConfig,
    MissConfig,
    PeftConfig,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    preprocess_loraga,
    set_peft_model_state_dict,
)
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from bonetune.errors import InputError
from bonetune.tuner import train_whole_modules_in_float32

if TYPE_CHECKING:
    from bonetune.training.config import RunConfig

# The adapter that a run began with, in its folder, where the trained one has to be converted.
INITIAL_FOLDER = "initial_adapter"
# Methods whose adapter holds a part of the base's weights from the beginning.
CHANGING_THE_BASE = ("pissa", "olora", "lora-ga", "milora")
# Settings that no baseline has, and those that training all weights does not have either.
FAMILYS_OWN = (
    *("variant", "mini_r", "bone_dropout", "exact_update", "target_parameters", "trainable_parameters"),
    *("trainable_token_indices", "ensure_weight_tying", "train_parts"),
)
ADAPTERS_OWN = (
    *("r", "target_modules", "exclude_modules", "rank_pattern", "bias", "layers_to_transform", "layers_pattern"),
    "modules_to_save",
)
LORAPLUS_LR_RATIO = 16.0
GRADIENT_BATCHES = 8

_LORA = ("lora_alpha", "lora_dropout", "alpha_pattern", "use_rslora")
_PLAIN = (*_LORA, "init_lora_weights")
# What each method takes in baseline_kwargs.
KWARGS: dict[str, tuple[str, ...]] = {
    "full": (),
    "lora": _PLAIN,
    "rslora": tuple(name for name in _PLAIN if name != "use_rslora"),
    "lora+": (*_PLAIN, "loraplus_lr_ratio", "loraplus_lr_embedding"),
    "dora": _PLAIN,
    "pissa": _PLAIN,
    "olora": _LORA,
    "lora-ga": (*_LORA, "direction", "scale", "stable_gamma", "gradient_batches"),
    "milora": _LORA,
    "miss": ("miss_dropout",),
    "miss-bat": (),
}
_OF_THE_OPTIMIZER = ("loraplus_lr_ratio", "loraplus_lr_embedding")
_OF_LORA_GA = ("direction", "scale", "stable_gamma")
# What PEFT calls the biases of adapted layers.
_OF_ADAPTED = {"miss": "MiSS_only", "miss-bat": "MiSS_only"}
_HALF = (torch.bfloat16, torch.float16)
_ADAPTER = "default"


@dataclass(frozen=True)
class Adapted:
    """A model to train.

    Args:
        model: PEFT's, or for `full` the model itself.
        seconds: that putting the adapter in took.
        notes: what the user should know.
    """

    model: Any
    seconds: float
    notes: list[str] = field(default_factory=list)


def contradictions(config: "RunConfig") -> Iterator[str]:
    """What is wrong with the settings of a baseline, a sentence each."""
    method, kwargs = config.baseline, config.baseline_kwargs
    if method is None:
        if kwargs:
            yield f"baseline_kwargs ({', '.join(kwargs)}) without baseline: say which method is meant"
        return
    defaults = {name: known.get_default(call_default_factory=True) for name, known in type(config).model_fields.items()}
    chosen = [name for name in FAMILYS_OWN if getattr(config, name) != defaults[name]]
    if chosen:
        yield f"{', '.join(chosen)}: the Bone family's, which baseline {method} does not have: leave it out"
    if method == "full":
        if chosen := [name for name in ADAPTERS_OWN if getattr(config, name) != defaults[name]]:
            yield f"{', '.join(chosen)}: an adapter's, and baseline full trains all parameters: leave it out"
    elif config.target_modules == ():
        yield f"target_modules names no layer, and baseline {method} has nothing to train: name some"
    yield from _wrong_kwargs(method, kwargs)
    changes = method in CHANGING_THE_BASE
    for is_wrong, what in (
        (
            config.quantization is not None and (changes or method == "full"),
            f"baseline {method} changes the base's weights, and quantization keeps them as codes: leave quantization out",
        ),
        (
            (method, config.quantization) == ("dora", "int8") and not torch.accelerator.is_available(),
            "quantization int8: PEFT's DoRA loses the scales on a CPU: choose another quantization, or none",
        ),
        (
            config.fsdp or config.deepspeed is not None,
            f"baseline {method} trains on one device, or on several by DDP: leave fsdp and deepspeed out",
        ),
        (
            method.startswith("miss") and bool(config.rank_pattern),
            f"rank_pattern: PEFT's MiSS has one r for all layers: leave it out with baseline {method}",
        ),
        (
            changes and config.bias != "none",
            f"bias={config.bias}: PEFT converts adapters of {method} without biases only: leave bias out",
        ),
        (
            changes and bool(kwargs.get("use_rslora")) and bool(config.rank_pattern or kwargs.get("alpha_pattern")),
            f"use_rslora with rank_pattern or alpha_pattern: PEFT converts no adapter of {method} that has both: choose one",
        ),
    ):
        if is_wrong:
            yield what


def method_in_words(method: str, r: Any, kwargs: dict[str, Any]) -> str:
    """A method with its sizes and all that was chosen: "lora, r=8, lora_alpha=16"."""
    if method == "full":
        return "full fine-tuning"
    sizes = {"r": r} | ({"lora_alpha": r} if "lora_alpha" in KWARGS.get(method, ()) else {}) | kwargs
    if method == "lora+":
        sizes = {"loraplus_lr_ratio": LORAPLUS_LR_RATIO} | sizes
    return ", ".join((method, *(f"{name}={value}" for name, value in sorted(sizes.items(), key=lambda s: s[0] != "r"))))


def adapt(
    config: "RunConfig", model: Any, estimate: Callable[[Any], None] | None = None, initial: Path | None = None
) -> Adapted:
    """Make a loaded model the one that a baseline trains.

    Args:
        config: the run's settings, with a baseline.
        model: the base; changed in place.
        estimate: goes forward and backward through the batches that LoRA-GA looks at.
        initial: the adapter that a run to be gone on with began with, for methods that change the base.

    Raises:
        InputError: PEFT cannot put the adapter in, or `initial` is not there.
    """
    began = time.perf_counter()
    if config.baseline == "full":
        model.float().requires_grad_(True)
        return Adapted(model, time.perf_counter() - began)
    notes = []
    with _pefts_refusals(config, model):
        if config.baseline in CHANGING_THE_BASE:
            model, notes = _with_a_part_of_the_base(config, model, estimate, initial)
        else:
            model = get_peft_model(model, peft_config(config))
    train_whole_modules_in_float32(model)
    if narrow := [name for name, p in model.named_parameters() if p.requires_grad and p.dtype in _HALF]:
        raise InputError(f"{narrow[0]} would be trained in half precision: leave bias out, or say dtype: float32.")
    return Adapted(model, time.perf_counter() - began, notes)


def as_in_training(config: "RunConfig", model: Any, *, without_values: bool = False) -> Any:
    """What takes the memory that `adapt`'s model takes in training, without computing what it begins with.

    Args:
        config: the run's settings, with a baseline.
        model: the base; changed in place.
        without_values: whether what is trained lies on the meta device, as the base does.
    """
    if config.baseline == "full":
        return model.float().requires_grad_(True)
    with _pefts_refusals(config, model):
        return get_peft_model(model, peft_config(config, plain=True), low_cpu_mem_usage=without_values)


def peft_config(config: "RunConfig", *, plain: bool = False) -> LoraConfig | MissConfig:
    """PEFT's configuration of a baseline.

    Args:
        config: the run's settings, with a baseline that has an adapter.
        plain: begin as LoRA does, where the method begins in another way.
    """
    method = str(config.baseline)
    kwargs: dict[str, Any] = {k: value for k, value in config.baseline_kwargs.items() if k not in _OF_THE_OPTIMIZER}
    bias = _OF_ADAPTED.get(method, "lora_only") if config.bias == "bone_only" else config.bias
    shared: dict[str, Any] = {"r": config.r, "bias": bias, "task_type": TaskType(config.task_type)}
    for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"):
        value = getattr(config, name)
        shared[name] = list(value) if isinstance(value, tuple) else value
    if method.startswith("miss"):
        return MissConfig(**shared, init_weights="bat" if method == "miss-bat" else True, **kwargs)
    kwargs.pop("gradient_batches", None)
    of_ga = {name: kwargs.pop(name) for name in _OF_LORA_GA if name in kwargs}
    if "lora_alpha" not in kwargs:  # a scale of 1 (of sqrt(r) with use_rslora) in each layer
        kwargs = {"alpha_pattern": dict[str, Any](config.rank_pattern)} | kwargs | {"lora_alpha": config.r}
    start: Any = kwargs.pop("init_lora_weights", {"pissa": "pissa", "olora": "olora", "lora-ga": "lora_ga"}.get(method, True))
    return LoraConfig(
        **shared,
        **dict[str, Any](use_rslora=method == "rslora") | kwargs,
        rank_pattern=dict(config.rank_pattern),
        use_dora=method == "dora",
        init_lora_weights=True if plain and method in CHANGING_THE_BASE else start,
        lora_ga_config=LoraGAConfig(**of_ga) if method == "lora-ga" else None,
    )


def optimizer(config: "RunConfig", model: Any, kind: type[torch.optim.Optimizer], options: dict[str, Any]) -> Any:
    """LoRA+'s optimizer of a kind that takes `options`, the rate of A among them."""
    chosen = {"loraplus_lr_ratio": LORAPLUS_LR_RATIO} | {
        name: value for name, value in config.baseline_kwargs.items() if name in _OF_THE_OPTIMIZER
    }
    return create_loraplus_optimizer(model, kind, loraplus_weight_decay=config.weight_decay, **chosen, **options)


def save_initial(config: "RunConfig", model: Any, folder: Path) -> None:
    """Before the first step: keep in the run's folder what `save` and `adapt` need of the beginning."""
    if config.baseline in CHANGING_THE_BASE:
        model.save_pretrained(folder / INITIAL_FOLDER)
        (folder / INITIAL_FOLDER / "README.md").unlink(missing_ok=True)


def save(config: "RunConfig", model: Any, into: Path, folder: Path) -> None:
    """Write the trained model of `full`, or the adapter, for the base as it was before `adapt`.

    Args:
        config: the run's settings, with a baseline.
        model: the trained model.
        into: where to.
        folder: the run's, with the adapter that it began with.
    """
    if config.baseline not in CHANGING_THE_BASE:
        model.save_pretrained(into)
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* changes the base weights of the model and should thus not be used", UserWarning)
        model.save_pretrained(into, path_initial_model_for_weight_conversion=str(folder / INITIAL_FOLDER))
    # PEFT converts the pairs and forgets modules that were trained whole
    file = into / "adapter_model.safetensors"
    converted, trained = load_file(file), get_peft_model_state_dict(model)
    whole = {name: tensor.contiguous() for name, tensor in trained.items() if name not in converted}
    if whole:
        save_file(converted | whole, file, metadata={"format": "pt"})


def _with_a_part_of_the_base(
    config: "RunConfig", model: Any, estimate: Callable[[Any], None] | None, initial: Path | None
) -> tuple[Any, list[str]]:
    if (accelerator := torch.accelerator.current_accelerator(check_available=True)) is not None:
        # decompositions of a large model's weights are nothing for a CPU
        model.to(torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0"))))
    ranks = _ranks(config, model)
    _check_ranks(config, model, ranks)
    complete: Any = peft_config(config)
    plain = peft_config(config, plain=True)
    if config.baseline == "lora-ga" and initial is None:
        assert estimate is not None
        _estimate_gradients(model, complete, list(ranks), estimate)
    with _weights_in_float32(model, list(ranks)) as losses:
        adapted: Any = get_peft_model(model, complete if initial is None and config.baseline != "milora" else plain)
        if initial is not None:
            _begin_as(adapted, initial)
        elif config.baseline == "milora":
            _minor_components(adapted)
        if initial is not None or config.baseline == "milora":
            for layer in _lora_layers(adapted):
                _take_out(layer, product_first=config.baseline == "lora-ga")
    adapted.peft_config[_ADAPTER].init_lora_weights = complete.init_lora_weights
    return adapted, losses


def _ranks(config: "RunConfig", model: Any) -> dict[str, int]:
    """Names of the modules that get an adapter, with its rank. The model is as it was afterwards."""
    tried: Any = get_peft_model(model, peft_config(config, plain=True), low_cpu_mem_usage=True)
    names = {id(module): name for name, module in tried.base_model.model.named_modules()}
    layers: Iterator[Any] = (module for module in tried.modules() if hasattr(module, "lora_A"))
    found = {names[id(layer)]: layer.r[_ADAPTER] for layer in layers}
    tried.unload()
    return found


def _check_ranks(config: "RunConfig", model: Any, ranks: dict[str, int]) -> None:
    needed = 2 if config.baseline == "lora-ga" else 1
    for name, r in ranks.items():
        module = model.get_submodule(name)
        if not isinstance(module, nn.Linear | Conv1D):
            kind = type(module).__name__
            raise InputError(
                f"target_modules: baseline {config.baseline} is for Linear layers, and {name} is {kind}: leave it out."
            )
        shape = tuple(module.weight.shape)
        if needed * r > min(shape):
            raise InputError(
                f"r={r}: baseline {config.baseline} takes {needed * r} components of each weight, and {name} {shape} has "
                f"{min(shape)}: choose r of at most {min(shape) // needed}, or another for it in rank_pattern."
            )


def _estimate_gradients(model: Any, config: PeftConfig, names: list[str], estimate: Callable[[Any], None]) -> None:
    """Leave the weights' mean gradients with their modules, where PEFT's LoRA-GA takes them from."""
    looked_at = LoraConfig(target_modules=names, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())  # pyright: ignore[reportArgumentType]  (PEFT's Literal lacks it)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing when gradients are computed", UserWarning)
        preprocess_loraga(model, looked_at, lambda: estimate(model))
    silent = [name for name in names if not hasattr(model.get_submodule(name), "_peft_loraga_grad")]
    if silent:
        raise InputError(f"target_modules: no gradient of baseline lora-ga reaches {silent[0]}: leave it out.")


def _minor_components(model: Any) -> None:
    """MiLoRA (arXiv 2406.09044): A and B of each weight's smallest singular values."""
    for layer in _lora_layers(model):
        weight = layer.get_base_layer().weight.detach()
        r, scale = layer.r[_ADAPTER], layer.scaling[_ADAPTER]
        u, s, vh = torch.linalg.svd(weight.T if layer.fan_in_fan_out else weight, full_matrices=False)
        root = (s[-r:] / scale).sqrt()
        # laid out as they are when they come from a file: products of other layouts have other bits
        layer.lora_A[_ADAPTER].weight.data = (root[:, None] * vh[-r:]).contiguous()
        layer.lora_B[_ADAPTER].weight.data = (u[:, -r:] * root).contiguous()


def _begin_as(model: Any, initial: Path) -> None:
    file = initial / "adapter_model.safetensors"
    if not file.is_file():
        raise InputError(f"{file}, which the run began with, is not there: put it back, or start a new run.")
    pairs = {name: tensor for name, tensor in load_file(file).items() if ".lora_A." in name or ".lora_B." in name}
    set_peft_model_state_dict(model, pairs)


@torch.no_grad()
def _take_out(layer: Any, *, product_first: bool) -> None:
    """Take scale * B A out of the weight, multiplied in PEFT's order, which differs by method: a resumed run has equal bits."""
    a, b, scale = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight, layer.scaling[_ADAPTER]
    part = scale * (b @ a) if product_first else scale * b @ a
    weight = layer.get_base_layer().weight
    weight.data = weight.data - (part.T if layer.fan_in_fan_out else part)


@contextmanager
def _weights_in_float32(model: Any, names: list[str]) -> Iterator[list[str]]:
    """The named modules' weights in float32 while it is open; a note comes into the list if they lose by rounding."""
    notes: list[str] = []
    weights = [model.get_submodule(name).weight for name in names]
    dtypes = [weight.dtype for weight in weights]
    before = [float(weight.detach().float().square().sum()) for weight in weights]
    for weight in weights:
        weight.data = weight.data.float()
    yield notes
    lost = 0.0
    for weight, dtype in zip(weights, dtypes, strict=True):
        wide = weight.data
        weight.data = wide.to(dtype)
        lost += float((weight.data.float() - wide).square().sum())
    if lost:
        share, kind = (lost / sum(before)) ** 0.5, str(dtypes[0]).removeprefix("torch.")
        notes.append(
            f"What the adapter leaves of the base is rounded to {kind}, and the saved adapter is for the base as it was: their "
            f"weights differ by {100 * share:.2g}% (root mean square) from the trained model's. dtype: float32 loses nothing."
        )


def _lora_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if _ADAPTER in (getattr(module, "lora_A", None) or ())]


@contextmanager
def _pefts_refusals(config: "RunConfig", model: Any) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except (AttributeError, ImportError, KeyError, NotImplementedError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise InputError(f"PEFT cannot give {type(model).__name__} what baseline {config.baseline} is: {why}") from error


def _wrong_kwargs(method: str, kwargs: dict[str, Any]) -> Iterator[str]:
    known = KWARGS[method]
    for name, value in kwargs.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            others = f"it takes {', '.join(known)}" if known else "it takes nothing"
            yield f"baseline_kwargs: {method} has no {name!r}" + (f"; did you mean {near[0]!r}?" if near else f"; {others}")
        elif name == "init_lora_weights":
            if not _is_start(method, value):
                starts = "pissa or pissa_niter_N" if method == "pissa" else "true, gaussian or orthogonal"
                yield f"baseline_kwargs.init_lora_weights of {method} is {starts}, got {value!r}"
        elif not _KINDS[name][0](value):
            yield f"baseline_kwargs.{name} should be {_KINDS[name][1]}, got {value!r}"


def _is_start(method: str, value: Any) -> bool:
    if method != "pissa":
        return value is True or value in ("gaussian", "orthogonal")
    niter = value.removeprefix("pissa_niter_") if isinstance(value, str) else ""
    return value == "pissa" or (niter != value and niter.isdecimal())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_ABOVE_0: tuple[Callable[[Any], bool], str] = (lambda v: _is_number(v) and 0 < v < float("inf"), "a number above 0")
_SHARE: tuple[Callable[[Any], bool], str] = (lambda v: _is_number(v) and 0 <= v < 1, "at least 0 and less than 1")
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("lora_alpha", "stable_gamma", "loraplus_lr_ratio", "loraplus_lr_embedding"), _ABOVE_0),
    **dict.fromkeys(("lora_dropout", "miss_dropout"), _SHARE),
    "use_rslora": (lambda v: isinstance(v, bool), "true or false"),
    "gradient_batches": (lambda v: type(v) is int and v > 0, "an integer above 0"),
    "alpha_pattern": (
        lambda v: isinstance(v, dict) and all(isinstance(name, str) and _ABOVE_0[0](alpha) for name, alpha in v.items()),
        "numbers above 0 by name",
    ),
    "direction": (lambda v: v in ("ArBr", "A2rBr", "ArB2r", "random"), "ArBr, A2rBr, ArB2r or random"),
    "scale": (lambda v: v in ("stable", "weight_svd", "gd_scale", "unit"), "stable, weight_svd, gd_scale or unit"),
}
