"""The rows of the tables: PEFT's methods and this package's variants at r = 64, as the parts of the benchmark share them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, MissConfig, PeftConfig, get_peft_model
from torch import nn

from bonetune import VARIANTS, BoneConfig

R = 64


@dataclass(frozen=True)
class Method:
    """A row.

    Args:
        formula: what it computes, as `benchmarks.floors` names it.
        config: makes the configuration from LoRA's rank and the settings that all methods share; None leaves the model frozen.
        narrow: whether the adapter is kept in the base's dtype; else in float32, PEFT's default.
    """

    formula: str
    config: Callable[[int, dict[str, Any]], PeftConfig] | None = None
    narrow: bool = False


def _bone(variant: str, **more: Any) -> Callable[[int, dict[str, Any]], PeftConfig]:
    return lambda _, shared: BoneConfig(r=R, variant=variant, mini_r=R, **more, **shared)


def _lora(k: int, shared: dict[str, Any]) -> PeftConfig:
    return LoraConfig(r=k, lora_alpha=k, **shared)


def _miss(_: int, shared: dict[str, Any]) -> PeftConfig:
    return MissConfig(r=R, **shared)


def _peft_bat(_: int, shared: dict[str, Any]) -> PeftConfig:
    return MissConfig(r=R, init_weights="bat", **shared)


METHODS: dict[str, Method] = {
    "frozen": Method("frozen"),
    "lora": Method("lora", _lora),
    "miss (PEFT)": Method("bone", _miss),
    "bat (PEFT)": Method("bat", _peft_bat),
    **{variant: Method(variant, _bone(variant)) for variant in VARIANTS},
    **{f"{variant} exact": Method(f"{variant} exact", _bone(variant, exact_update=True)) for variant in ("bat", "bat-row")},
}
METHODS |= {
    f"{name} bf16": Method(METHODS[name].formula, METHODS[name].config, narrow=True)
    for name in ("lora", "miss (PEFT)", "bat (PEFT)", "bone", "bat-row", "bat")
}

# Ours beside PEFT's method of the same function.
SAME_FUNCTION = [
    (f"{ours}{kept}", f"{theirs} (PEFT){kept}") for kept in ("", " bf16") for ours, theirs in (("bone", "miss"), ("bat", "bat"))
]


def named(names: Iterable[str]) -> dict[str, Method]:
    """Those methods, in that order."""
    return {name: METHODS[name] for name in names}


def adapt(model: Any, method: Method, **settings: Any) -> Any:
    """`model` with the method's adapter on all its Linear layers but a language model's head; it is changed in place."""
    model.requires_grad_(False)
    if method.config is None:
        return model
    config = method.config(lora_rank(linear_shapes(model)), {"target_modules": "all-linear", **settings})
    return get_peft_model(model, config, autocast_adapter_dtype=not method.narrow)


def linear_shapes(model: nn.Module) -> list[tuple[int, int]]:
    """(out, in) of every layer that `adapt` adapts."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # pyright: ignore[reportCallIssue]  (nn.Module's attributes are untyped)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    return [(linear.out_features, linear.in_features) for linear in linears]


def lora_rank(shapes: list[tuple[int, int]]) -> int:
    """The rank k at which LoRA's k * (out + in) parameters over all layers come nearest to bone's R * out."""
    return max(1, round(R * sum(out for out, _ in shapes) / sum(out + inp for out, inp in shapes)))


@torch.no_grad()
def randomize(model: nn.Module) -> nn.Module:
    """The model with small random values in its trainable tensors, as after training."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.normal_(std=0.01)
    return model
