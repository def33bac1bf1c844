"""What of an RWKV model is trained whole beside an adapter, by the words of RWKV-PEFT's `train_parts`."""

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

from torch import nn

from bonetune.errors import InputError
from bonetune.rwkv.layers import HeadsNorm, LayerNorm
from bonetune.rwkv.x060 import ChannelMixing6, TimeMixing6
from bonetune.rwkv.x070 import ChannelMixing7, TimeMixing7

Part = Literal["time", "ln", "emb", "head", "state"]
PARTS: tuple[Part, ...] = get_args(Part)
# In the first block nothing reads them.
_UNUSED = ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")
_STATE = "time_state"


def parameters_of(model: nn.Module, parts: Sequence[Part]) -> list[str]:
    """The names of the parameters that some parts are.

    Args:
        model: an RWKV model, without adapters.
        parts: `time` is what time and channel mixing have beside their projections: token shifts, decays, their low-rank
            maps and the like, whatever the version calls them; `ln` all norms; `emb` and `head` those; `state` the states
            that sequences begin with (state tuning).

    Raises:
        InputError: an unknown part, or one that the model does not have.
    """
    if unknown := [part for part in parts if part not in PARTS]:
        raise InputError(f"train_parts has {unknown[0]!r}: choose from {', '.join(PARTS)}.")
    found = {part: sorted(_of_part(model, part)) for part in parts}
    if empty := [part for part, names in found.items() if not names]:
        raise InputError(f"train_parts has {empty[0]!r}, and the model ({type(model).__name__}) has no such parameters.")
    return sorted({name for names in found.values() for name in names})


def _of_part(model: nn.Module, part: Part) -> Iterable[str]:
    for name, module in model.named_modules():
        own = {f"{name}.{key}" for key, _ in module.named_parameters(recurse=False)} - set(_UNUSED)
        states = {key for key in own if key.endswith(f".{_STATE}")}
        if isinstance(module, TimeMixing6 | TimeMixing7 | ChannelMixing6 | ChannelMixing7):
            yield from states if part == "state" else own - states if part == "time" else ()
        elif isinstance(module, LayerNorm | HeadsNorm):
            yield from own if part == "ln" else ()
        elif name == part:
            yield from own
