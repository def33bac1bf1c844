"""PEFT's MiSS, from 0.17 on: type MISS, tensors `miss_block`; `init_weights` says bone (true), `bat` or `mini`."""

from pathlib import Path

from peft import MissConfig
from torch import nn

from bonetune.errors import AdapterFileError, InputError
from bonetune.formats.fitting import Fitted
from bonetune.formats.peft_folder import COMMON, bone_config, read_folder, write_folder
from bonetune.formats.state import AdapterState
from bonetune.tuner import BoneConfig

NAME = "miss"
_VARIANTS = {"bone": True, "bat": "bat", "mini": "mini"}
_BIASES = {"none": "none", "all": "all", "MiSS_only": "bone_only"}


def read(path: Path) -> AdapterState:
    """Read an adapter folder of type MISS.

    Raises:
        AdapterFileError: it is none, or its tensors cannot be what its configuration says.
    """
    folder = read_folder(path, NAME, "MISS", ["miss_block"])
    init, bias = folder.config.get("init_weights", True), folder.config.get("bias", "none")
    variant = "bone" if isinstance(init, bool) else next((name for name, value in _VARIANTS.items() if value == init), None)
    if variant is None:
        raise AdapterFileError(f"{path} has init_weights {init!r}, which is none of MiSS's: true, 'bat' or 'mini'.")
    if bias not in tuple(_BIASES):
        raise AdapterFileError(f"{path} has bias {bias!r}, which is none of MiSS's: {', '.join(_BIASES)}.")
    given = {"variant": variant, "init_weights": True, "bias": _BIASES[bias]}
    config, notes = bone_config(folder, {"miss_dropout": "bone_dropout"}, given)
    if variant == "bat" and config.bone_dropout:
        notes.append(f"dropout {config.bone_dropout} was kept; MiSS itself has none for bat, whatever is set")
    tensors = {name.removesuffix(".miss_block"): tensor for name, tensor in folder.tensors.items()}
    return AdapterState(config, tensors, folder.whole, folder.source, tuple(notes)).check()


def write(state: AdapterState, path: Path) -> None:
    """Write an adapter folder that PEFT loads as MiSS.

    Raises:
        InputError: MiSS does not have the variant, or a setting that the adapter needs.
    """
    config = state.config
    if config.variant not in _VARIANTS:
        raise InputError(
            f"PEFT's MiSS has no variant {config.variant}: it knows {', '.join(_VARIANTS)}. Write peft-bone, or lora (by "
            "truncated SVD), or merge the adapter."
        )
    _refuse_settings(config)
    if stacked := [name for name, tensor in state.tensors.items() if tensor.dim() != (3 if config.variant == "bat" else 2)]:
        raise InputError(f"PEFT's MiSS adapts Linear layers only, and {stacked[0]} is none (of {len(stacked)} such).")
    miss = MissConfig(
        r=config.r,
        mini_r=config.mini_r,
        init_weights=_VARIANTS[str(config.variant)],  # pyright: ignore[reportArgumentType]  (PEFT's own Literal)
        miss_dropout=config.bone_dropout,
        bias=next(name for name, ours in _BIASES.items() if ours == config.bias),
        **{name: getattr(config, name) for name in COMMON},
    )
    write_folder(path, miss, {f"{name}.miss_block": tensor for name, tensor in state.tensors.items()}, state)


def check_layers(fitted: Fitted) -> None:
    """Raise `InputError` for layers that PEFT's MiSS does not adapt: all but `nn.Linear`."""
    wrong = [name for name, layer in fitted.layers.items() if type(layer.get_base_layer()) is not nn.Linear]
    if wrong:
        raise InputError(f"PEFT's MiSS adapts Linear layers only, and {wrong[0]} is none (of {len(wrong)} such).")


def _refuse_settings(config: BoneConfig) -> None:
    for name in ("rank_pattern", "target_parameters", "trainable_token_indices", "ensure_weight_tying"):
        if getattr(config, name):
            raise InputError(
                f"PEFT's MiSS has no {name}, and this adapter has {name}={getattr(config, name)!r}: write it "
                "as peft-bone or lora, or merge the adapter."
            )
