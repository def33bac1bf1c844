"""Batches of which each row has its own adapter: `model(..., adapter_names=["one", "__base__", "two"])`."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from bonetune.tuner.embedding import BoneEmbedding
from bonetune.tuner.layer import NO_ADAPTER, AdapterNames, BoneLayer, layers_of


@contextmanager
def adapters_by_row(model: nn.Module, adapter_names: Sequence[str], num_beams: int | None) -> Iterator[None]:
    """Within it, every adapted layer of `model` computes row i with the adapter `adapter_names[i]`.

    Beam search repeats each row `num_beams` times, but not for the encoder of an encoder-decoder.

    Raises:
        ValueError: names of adapters that are not there, or a model in training mode.
        TypeError: something else than a list of names.
    """
    if not isinstance(adapter_names, list | tuple):
        raise TypeError(f"Got adapter names of type {type(adapter_names)}, expected a list of str.")
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    known = {name for layer in layers_of(model).values() for name in layer.bone_block}
    if unknown := sorted(set(adapter_names) - known - {NO_ADAPTER}):
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. There are {', '.join(sorted(known))}, and "
            f"{NO_ADAPTER} for none."
        )
    _refuse_tables_that_have_no_rows(model, set(adapter_names))
    encoder: Any = getattr(model, "get_encoder", lambda: None)() if num_beams and num_beams > 1 else None
    in_encoder = set() if encoder is None or encoder is model else {id(module) for module in encoder.modules()}
    by_row = AdapterNames.of(adapter_names)
    repeated = AdapterNames.of([name for name in adapter_names for _ in range(num_beams or 1)])
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, BoneLayer | AuxiliaryTrainingWrapper):
                names = by_row if id(module) in in_encoder else repeated
                hook = module.register_forward_pre_hook(partial(_with_names, names), with_kwargs=True)
                stack.callback(hook.remove)
        yield


def _refuse_tables_that_have_no_rows(model: nn.Module, adapter_names: set[str]) -> None:
    """Position tables are looked up by position, whatever the size of what they are called with."""
    inputs = getattr(model, "get_input_embeddings", lambda: None)()
    if inputs is None:
        return
    for name, layer in layers_of(model).items():
        if isinstance(layer, BoneEmbedding) and layer.weight is not inputs.weight and adapter_names & set(layer.bone_block):
            raise ValueError(
                f"Rows of one batch cannot have different adapters on {name}, which is looked up by something else than the "
                "rows' tokens: run each adapter's rows in a batch of their own."
            )


def _with_names(names: AdapterNames, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    return args, kwargs | {"adapter_names": names}
