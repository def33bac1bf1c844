"""Torch's own files, written a tensor at a time."""

import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """What a tensor takes in a file."""

    shape: torch.Size
    dtype: torch.dtype


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
