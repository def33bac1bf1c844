"""Adapter files of every origin, through one `AdapterState`."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from bonetune.errors import AdapterFileError, InputError
from bonetune.formats import bare, bone, lora, miss, rwkv
from bonetune.formats.checkpoint import Checkpoint
from bonetune.formats.fitting import Fitted, fit
from bonetune.formats.peft_folder import peft_type
from bonetune.formats.state import AdapterState, Source
from bonetune.formats.tensors import ADAPTER_FILES, read_tensors

__all__ = [
    "READERS",
    "TARGETS",
    "AdapterState",
    "Checkpoint",
    "Fitted",
    "Source",
    "Target",
    "detect",
    "fit",
    "read_adapter",
]

# What an adapter can be written as, and `gguf`, which is of a whole model.
Target = Literal["peft-bone", "miss", "rwkv-disha", "lora", "gguf-lora", "gguf"]
TARGETS: tuple[Target, ...] = get_args(Target)
READERS: dict[str, Callable[[Path], AdapterState]] = {
    bone.NAME: bone.read,
    miss.NAME: miss.read,
    lora.NAME: lora.read,
    rwkv.NAME: rwkv.read,
    bare.NAME: bare.read,
}
_METHODS = {"BONE": bone.NAME, "MISS": miss.NAME, "LORA": lora.NAME}


def read_adapter(path: Path, format_name: str | None = None, variant: str | None = None) -> AdapterState:
    """Read an adapter of any format.

    Args:
        path: a folder, or a file.
        format_name: one of `READERS`; None: as the file proves.
        variant: for formats that do not say it.

    Raises:
        InputError: an unknown format, or one that the file does not prove.
        AdapterFileError: a file that is not of the format, torn, or hostile.
    """
    format_name = format_name or detect(path)
    if format_name not in READERS:
        raise InputError(f"Unknown format {format_name!r} to read from: choose one of {', '.join(READERS)}.")
    if format_name in (bare.NAME, rwkv.NAME):
        return (bare if format_name == bare.NAME else rwkv).read(path, variant)
    state = READERS[format_name](path)
    if variant is not None and variant != state.config.variant:
        raise InputError(f"{path} says that it is {state.config.variant}, and --variant {variant} was passed: leave it out.")
    return state


def detect(path: Path) -> str:
    """The format of an adapter, as its files prove it.

    Raises:
        InputError: there is nothing, or nothing that proves a format; it says what to pass.
        AdapterFileError: an adapter of a method that is none of this family.
    """
    if not path.exists():
        raise InputError(f"There is no adapter at {path}.")
    method = peft_type(path)
    if method is not None:
        if method not in _METHODS:
            raise AdapterFileError(
                f"{path} is an adapter of PEFT's method {method}: only {', '.join(_METHODS)} are read. Merge it with PEFT."
            )
        return _METHODS[method]
    if path.is_dir():
        file = next((path / name for name in ADAPTER_FILES if (path / name).is_file()), None)
        if file is None:
            raise InputError(f"{path} holds no adapter: neither adapter_config.json nor {ADAPTER_FILES[0]} is in it.")
        path = file
    if path.suffix == ".gguf":
        raise InputError(f"{path} is a GGUF file, which is written but not read: convert the adapter that it was made of.")
    names = read_tensors(path).keys()
    proven = [
        name
        for name, ends in ((rwkv.NAME, (".disha", ".bone", ".att.time_state")), (bare.NAME, (".bone_block", ".miss_block")))
        if any(tensor.removesuffix(".default").endswith(ends) for tensor in names)
    ]
    if len(proven) != 1:
        found = (
            f"it looks like {' and '.join(proven)}" if proven else f"its tensors are called {', '.join(sorted(names)[:3])}, ..."
        )
        raise InputError(f"The format of {path} is not clear: {found}. Pass --from, one of {', '.join(READERS)}.")
    return proven[0]
