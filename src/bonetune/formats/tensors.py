"""Files of tensors, read so that nothing in them can run, and nothing torn or forged passes."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from bonetune.errors import AdapterFileError, first_line
from bonetune.formats.checkpoint import read_header

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a `.bin`, `.pt` or `.pth` file that holds nothing but tensors by name.

    Raises:
        InputError: the file is torn, forged, or holds something else.
    """
    if path.suffix == ".safetensors":
        return _safetensors(path)
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in map_tensors(path).items()}


def map_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.bin`, `.pt` or `.pth` file, not yet in memory: the pages of the file are read where they are used.

    Raises:
        AdapterFileError: the file is torn, forged, or holds something else.
    """
    if not path.is_file():
        raise AdapterFileError(f"There is no file {path}.")
    with path.open("rb") as file:
        archive = file.read(4) == b"PK\x03\x04"
    if not archive:
        raise AdapterFileError(
            f"{path} is neither safetensors nor a file that torch has written since 1.6. Older pickles are not opened: load "
            "and save it again where you trust it."
        )
    try:
        # mapped, since a record that claims to be longer than it is then ends with the file
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the unpickler raises whatever the bytes lead it to
        raise AdapterFileError(
            f"{path} cannot be opened safely: it is torn, or holds more than tensors ({first_line(error)})"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        raise AdapterFileError(f"{path} should hold tensors by name and nothing else.")
    tensors = {name: tensor.detach() for name, tensor in content.items()}
    _check(path, tensors)
    return tensors


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
    _check(path, tensors)
    return tensors


def _check(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise `AdapterFileError` for tensors that no adapter has, and for those that would take more memory than the file."""
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in _DTYPES:
            kind = f"{tensor.layout} {tensor.dtype} on {tensor.device}".replace("torch.", "")
            raise AdapterFileError(f"{path} has a tensor {name} that is {kind}; plain numbers are read, up to 64 bits.")
    # a stride of 0 makes any number of elements out of one
    views = {(t.data_ptr(), tuple(t.shape), t.stride()): t.numel() * t.element_size() for t in tensors.values()}
    size = path.stat().st_size
    if sum(views.values()) > size:
        raise AdapterFileError(f"{path} is forged: its tensors would take {sum(views.values())} bytes, and it has {size}.")
