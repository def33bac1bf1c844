"""Torch's own files of tensors: read so that nothing in them can run and nothing torn or forged passes, written one by one."""

import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from bonetune.errors import AdapterFileError, first_line

_DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


class Layout(NamedTuple):
    """What a tensor takes in a file."""

    shape: torch.Size
    dtype: torch.dtype


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
    check_plain(path, tensors)
    return tensors


def check_plain(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise `AdapterFileError` for tensors that no model has, and for those that would take more memory than the file."""
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in _DTYPES:
            kind = f"{tensor.layout} {tensor.dtype} on {tensor.device}".replace("torch.", "")
            raise AdapterFileError(f"{path} has a tensor {name} that is {kind}; plain numbers are read, up to 64 bits.")
    # a stride of 0 makes any number of elements out of one
    views = {(t.data_ptr(), tuple(t.shape), t.stride()): t.numel() * t.element_size() for t in tensors.values()}
    size = path.stat().st_size
    if sum(views.values()) > size:
        raise AdapterFileError(f"{path} is forged: its tensors would take {sum(views.values())} bytes, and it has {size}.")


def write_one_by_one(path: Path, layouts: Mapping[str, Layout], value: Callable[[str], Tensor]) -> None:
    """Write what `torch.save` of a dictionary of tensors writes, with one tensor in memory at a time.

    `torch.save` leaves room for the tensors, and each is then written to its room, with its checksum: torch does not read
    those, other programs do.

    Args:
        path: the file.
        layouts: of each tensor, in the order of the dictionary.
        value: called with each name once, in that order.
    """
    from torch.serialization import skip_data

    with path.open("wb") as file, skip_data():
        # memory that is never touched is never taken
        torch.save({name: torch.empty(layout.shape, dtype=layout.dtype) for name, layout in layouts.items()}, file)
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: info for info in archive.infolist()}
        directory = archive.start_dir  # pyright: ignore[reportAttributeAccessIssue]  (it has one: where its list of files begins)
    checksums: dict[str, int] = {}
    with path.open("r+b") as file:
        for number, (name, layout) in enumerate(layouts.items()):
            tensor, record = value(name), records[f"archive/data/{number}"]
            if (tensor.shape, tensor.dtype, tensor.nbytes) != (*layout, record.file_size):
                raise ValueError(f"{name} is {tensor.dtype} of {tuple(tensor.shape)}, and there is room for {layout}")
            if tensor.nbytes:
                content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
                checksums[record.filename] = zlib.crc32(content)
                _fill(file, record, content, checksums[record.filename])
        _note(file, directory, checksums)


def _fill(file: BinaryIO, record: zipfile.ZipInfo, content: memoryview, checksum: int) -> None:
    """Write a record's bytes, and behind them its checksum, where that is kept there."""
    file.seek(record.header_offset + 26)
    name_length, extra_length = struct.unpack("<HH", file.read(4))
    file.seek(name_length + extra_length, 1)
    file.write(content)
    if file.read(4) == b"PK\x07\x08":
        file.write(struct.pack("<L", checksum))


def _note(file: BinaryIO, directory: int, checksums: Mapping[str, int]) -> None:
    """Write the checksums to the archive's directory."""
    file.seek(directory)
    while (entry := file.read(46))[:4] == b"PK\x01\x02":
        name_length, extra_length, comment_length = struct.unpack_from("<HHH", entry, 28)
        name, following = file.read(name_length).decode(), file.tell() + extra_length + comment_length
        if name in checksums:
            file.seek(following - extra_length - comment_length - name_length - 46 + 16)
            file.write(struct.pack("<L", checksums[name]))
        file.seek(following)
