"""Merging all layers of a model: what is checked before the first one, undone after a failure, and said afterwards."""

import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from peft.tuners.tuners_utils import onload_layer

from bonetune.tuner.layer import BoneLayer


def refuse_what_is_not_finite(layers: Mapping[str, BoneLayer], adapter_names: Sequence[str] | None) -> None:
    """Raise the ValueError that a `safe_merge` would raise, before the first layer is merged."""
    for name, layer in layers.items():
        if not (new := _new(layer, adapter_names)):
            continue
        with onload_layer(layer):
            try:
                layer.check_safe_merge(new)
            except ValueError as error:
                raise ValueError(f"{error}: {name} would not be finite.") from error


def refuse_what_cannot_be_undone(
    layers: Mapping[str, BoneLayer], adapter_names: Sequence[str] | None, *, exact_unmerge: bool
) -> None:
    """Raise ValueError where a merge could not be undone as was asked for.

    A layer that was merged without its weight being kept has none to restore: what is merged on top of that can only be
    computed back too, if at all.
    """
    for name, layer in layers.items():
        new, without = _new(layer, adapter_names), layer.merged and not layer.keeps_original
        if not new:
            continue
        if exact_unmerge and without:
            raise ValueError(
                f"{', '.join(layer.merged_adapters)} was merged into {name} without keeping its weight, so no further merge "
                "there can be undone exactly: call `unmerge_adapter` first, or pass exact_unmerge=False."
            )
        if (without or not (exact_unmerge or layer.merged)) and not layer.can_be_computed_back(new):
            raise ValueError(
                f"Arithmetic cannot undo a merge of BAT adapters of different kinds ({', '.join(new)}, into {name}): pass "
                "exact_unmerge=True."
            )


@contextmanager
def all_or_none(layers: Mapping[str, BoneLayer]) -> Iterator[None]:
    """Undo what was merged within it, on all layers, if one of them fails."""
    before = {name: list(layer.merged_adapters) for name, layer in layers.items()}
    try:
        yield
    except BaseException:
        for name, layer in layers.items():
            if layer.merged_adapters != before[name]:
                with onload_layer(layer):
                    layer.unmerge()
                    if before[name]:
                        layer.merge(adapter_names=before[name])
        raise


def warn_of_requantization(layers: Mapping[str, BoneLayer]) -> None:
    """One warning for all layers whose merged weights were just rounded to codes."""
    measured = [layer.requantization for layer in layers.values() if layer.requantization is not None]
    for layer in layers.values():
        layer.requantization = None
    if measured:
        share = statistics.median(error / update if update else float("inf") for error, update in measured)
        warnings.warn(
            f"{len(measured)} merged layers were quantized again: the rounding moved their weights by {share:.2g} times as "
            "much as the update did (median of root mean squares), and the merged model is that far from what was trained. "
            "`merge_and_unload(dequantize=True)` merges into the dequantized values.",
            stacklevel=3,
        )


def _new(layer: BoneLayer, adapter_names: Sequence[str] | None) -> list[str]:
    """Those of the named (or active) adapters that the layer has and that are not merged yet."""
    names = layer.active_adapters if adapter_names is None else adapter_names
    return [name for name in names if name in layer.bone_block and name not in layer.merged_adapters]
