"""What the adapter folders of PEFT's methods have in common: adapter_config.json, and tensors under `base_model.model.`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from peft import PeftConfig
from safetensors.torch import save_file
from torch import Tensor

from bonetune.errors import AdapterFileError, BonetuneError, first_line
from bonetune.files import CONVERSION_FILE, SUMMARY_FILE, folder_written_beside, read_config
from bonetune.formats.state import AdapterState, Source
from bonetune.formats.tensors import ADAPTER_CONFIG, ADAPTER_FILES, read_tensors, sha256
from bonetune.tuner import BoneConfig

_PREFIX = "base_model.model."
# Said by PEFT of every adapter; nothing that a method's own configuration would hold.
_OF_PEFT = ("peft_type", "peft_version")
# What PEFT's methods call by the same name.
COMMON = (
    "task_type",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "auto_mapping",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
)


@dataclass(frozen=True)
class Folder:
    """An adapter folder as it lies there.

    Args:
        config: adapter_config.json.
        tensors: those of the method, `layer.<suffix>` by the layer's name in the base model.
        whole: the others, by the parameter's name in the base model.
        source: the folder.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    whole: dict[str, Tensor]
    source: Source


def peft_type(path: Path) -> str | None:
    """The method that an adapter folder names; None if it is no adapter folder."""
    return str(read_config(path / ADAPTER_CONFIG).get("peft_type")) if (path / ADAPTER_CONFIG).is_file() else None


def read_folder(path: Path, format_name: str, method: str, suffixes: Iterable[str]) -> Folder:
    """Read an adapter folder.

    Args:
        path: the folder.
        format_name: the format as which it is read.
        method: the `peft_type` that it has to be of.
        suffixes: ends of the names of the method's tensors.

    Raises:
        AdapterFileError: there is no such folder, or it is of another method.
    """
    if not (path / ADAPTER_CONFIG).is_file():
        raise AdapterFileError(f"{path} is no adapter folder: it has no {ADAPTER_CONFIG}.")
    config = read_config(path / ADAPTER_CONFIG)
    if config.get("peft_type") != method:
        raise AdapterFileError(
            f"{path} holds an adapter of peft_type {config.get('peft_type')!r}, and {format_name} is {method}."
        )
    file = next((path / name for name in ADAPTER_FILES if (path / name).is_file()), None)
    if file is None:
        raise AdapterFileError(f"Adapter {path} has a configuration but no weights ({ADAPTER_FILES[0]}).")
    tensors, whole = {}, {}
    suffixes = tuple(f".{suffix}" for suffix in suffixes)
    for name, tensor in read_tensors(file).items():
        if not name.startswith(_PREFIX):
            raise AdapterFileError(f"{file} has a tensor {name}, and an adapter's are called {_PREFIX}...")
        name = name.removeprefix(_PREFIX)
        if name.endswith(suffixes):
            tensors[name] = tensor
        else:
            whole[name.replace(".base_layer.", ".")] = tensor
    hashes = {item.name: sha256(item) for item in (path / ADAPTER_CONFIG, file)}
    return Folder(config, tensors, whole, Source(format_name, str(path), hashes, trained_on(path)))


def trained_on(path: Path) -> str | None:
    """The fingerprint of the base model that an adapter was trained on, if a run or a conversion noted it beside it.

    Raises:
        AdapterFileError: what is noted is no text.
    """
    for file in (path / SUMMARY_FILE, path / CONVERSION_FILE):
        fingerprint = read_config(file).get("base_fingerprint") if file.is_file() else None
        if not isinstance(fingerprint, str | None):
            raise AdapterFileError(f"{file} has a base_fingerprint {fingerprint!r}, which should be a text.")
        if fingerprint:
            return fingerprint
    return None


def bone_config(folder: Folder, renamed: Mapping[str, str], values: Mapping[str, Any]) -> tuple[BoneConfig, list[str]]:
    """What the canonical configuration is, and what of the folder's has no place in it.

    Args:
        folder: as it was read.
        renamed: names of other methods' settings to those of `BoneConfig`.
        values: settings that are given by the reader.
    """
    known = {field.name for field in fields(BoneConfig)}
    settings = {renamed.get(name, name): value for name, value in folder.config.items() if name not in _OF_PEFT}
    ignored = [name for name, value in settings.items() if name not in known and value not in (None, False, {}, [], "")]
    settings = {name: value for name, value in settings.items() if name in known} | dict(values)
    notes = [f"{name}={folder.config.get(name)!r} was ignored" for name in ignored]
    if settings.get("bias", "none") != "none" and not any(name.endswith(".bias") for name in folder.whole):
        notes.append(f"bias={settings['bias']!r}, but the file holds no biases; PEFT's own Bone and MiSS do not save them")
    try:
        return BoneConfig(**settings), notes
    except (TypeError, AttributeError, ValueError) as error:
        if isinstance(error, BonetuneError):
            raise AdapterFileError(f"{folder.source.path}/{ADAPTER_CONFIG}: {error}") from error
        raise AdapterFileError(f"{folder.source.path}/{ADAPTER_CONFIG} has a wrong value: {first_line(error)}") from error


def write_folder(path: Path, config: PeftConfig, tensors: Mapping[str, Tensor], state: AdapterState) -> None:
    """Write an adapter folder beside its place and rename it.

    Args:
        path: the folder; it must not exist.
        config: the method's configuration.
        tensors: `layer.<suffix>` to tensor.
        state: whose whole tensors go along.
    """
    content = {_PREFIX + name: tensor.contiguous() for name, tensor in tensors.items()}
    for name, tensor in state.whole.items():
        layer, _, parameter = name.rpartition(".")
        inside = f"{layer}.base_layer.{parameter}" if layer in state.tensors else name
        content[_PREFIX + inside] = tensor.contiguous()
    with folder_written_beside(path, replace=True) as beside:
        save_file(content, beside / ADAPTER_FILES[0], metadata={"format": "pt"})
        config.save_pretrained(str(beside))
