"""Compilation of the layers that a model repeats, each of which is then compiled once for all."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def compiled_layers(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """While it is open, each layer of the model's stacks of layers of one class runs compiled, for any batch's shape.

    The modules and the names of their parameters stay what they are.

    Args:
        model: a Hugging Face model, adapted or not.
        enabled: false: nothing is done.
    """
    layers = repeated_layers(model) if enabled else []
    for layer in layers:
        layer.compile(dynamic=True)
    try:
        yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The members of each outermost `nn.ModuleList` of modules of one class, in the order of the model's modules."""
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module not in inside and len({type(layer) for layer in module}) == 1:
            found += module
            inside.update(part for layer in module for part in layer.modules())
    return found
