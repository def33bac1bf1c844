"""PEFT's Bone: type BONE, tensors `bone_block`. Of PEFT 0.14 to 0.18, its development of November 2024, and this package."""

from dataclasses import replace
from pathlib import Path

from bonetune.formats.peft_folder import bone_config, read_folder, write_folder
from bonetune.formats.state import AdapterState
from bonetune.tuner import is_of_november_2024

NAME = "peft-bone"


def read(path: Path) -> AdapterState:
    """Read an adapter folder of type BONE.

    Raises:
        AdapterFileError: it is none, or its tensors cannot be what its configuration says.
    """
    folder = read_folder(path, NAME, "BONE", ["bone_block"])
    tensors = {name.removesuffix(".bone_block"): tensor for name, tensor in folder.tensors.items()}
    config, notes = bone_config(folder, {}, {})
    if is_of_november_2024(config, [*tensors.values()]):
        config = replace(config, variant="bat")
        notes.append("`init_weights: true` with three-dimensional tensors is bat as PEFT wrote it in November 2024")
    return AdapterState(config, tensors, folder.whole, folder.source, tuple(notes)).check()


def write(state: AdapterState, path: Path) -> None:
    """Write an adapter folder that this package reads, and PEFT 0.14 to 0.18 if the variant is `bone` or `bat`."""
    write_folder(path, state.config, {f"{name}.bone_block": tensor for name, tensor in state.tensors.items()}, state)
