"""Files of tensors, read so that nothing in them can run, and nothing torn or forged passes."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from bonetune.errors import AdapterFileError, first_line
from bonetune.formats.checkpoint import read_header
from bonetune.torch_files import check_plain, map_tensors

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a `.bin`, `.pt` or `.pth` file that holds nothing but tensors by name.

    Raises:
        InputError: the file is torn, forged, or holds something else.
    """
    if path.suffix == ".safetensors":
        return _safetensors(path)
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in map_tensors(path).items()}


def sha256(path: Path) -> str:
    """A file's hash, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    read_header(path)  # which is stricter than the library: no name twice, no gaps
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, MemoryError, OverflowError) as error:
        raise AdapterFileError(f"{path} is not a whole safetensors file: {first_line(error)}") from error
    check_plain(path, tensors)
    return tensors
