"""Megatron's and RWKV's token files: `<prefix>.bin` holds the ids of all sequences, `<prefix>.idx` says where each is.

The index, little endian: the magic, u64 version, u8 code of the ids' type, u64 number of sequences n, u64 number of entries d;
then (n,) i32 lengths, (n,) i64 places in .bin, in bytes, and (d,) i64 numbers of the sequences that documents begin with; the
last of these is n.
"""

import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bonetune.errors import InputError
from bonetune.files import file_written_beside

SUFFIXES = (".bin", ".idx")
_MAGIC, _VERSION = b"MMIDIDX\x00\x00", 1
_HEAD = struct.Struct("<9sQBQQ")
# Codes of the types that ids may have; 6 and 7 are float32 and float64.
_TYPES = {
    code: np.dtype(name).newbyteorder("<")
    for code, name in {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}.items()
}


def binidx_rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """The sequences as rows with `input_ids`: (tokens,), views of a memory map, which is read where they are used.

    Args:
        path: `<prefix>.bin`, `<prefix>.idx`, or the prefix.

    Raises:
        InputError: one of the two files is missing, or the index is none, is cut off, or points outside of the ids.
    """
    index, content = files_of(path)
    for file, other in ((index, content), (content, index)):
        if not file.is_file():
            raise InputError(f"Token file {file} does not exist: it belongs beside {other.name}.")
    room = content.stat().st_size
    kind, lengths, places = _read_index(index, room)
    count = room // kind.itemsize
    ids = np.asarray(np.memmap(content, kind, "r", shape=(count,))) if count else np.empty(0, kind)
    for number in range(len(lengths)):
        first = int(places[number]) // kind.itemsize
        yield {"input_ids": ids[first : first + int(lengths[number])]}


def write_binidx(
    prefix: str | Path, documents: Iterable[Sequence[int] | np.ndarray], dtype: Any = np.uint16
) -> tuple[int, int]:
    """Write both files, a sequence for each document, as the documents come.

    Args:
        prefix: as `binidx_rows` takes it.
        documents: (tokens,) ids of each.
        dtype: of the ids in the file.

    Returns:
        The number of documents and that of tokens.

    Raises:
        InputError: a dtype that such files do not have, something that is no list of ids, an id that does not fit the dtype,
            or no token at all. Nothing is written then.
    """
    kind = np.dtype(dtype).newbyteorder("<")
    code = next((code for code, known in _TYPES.items() if known == kind), None)
    if code is None:
        known = ", ".join(known.name for known in _TYPES.values())
        raise InputError(f"Token files cannot hold ids as {kind.name}: choose from {known}.")
    index, content = files_of(prefix)
    lengths = array("i")
    # left from the right: the ids are in their place before the index that tells of them
    with file_written_beside(index) as index_beside, file_written_beside(content) as content_beside:
        with content_beside.open("wb") as file:
            for number, document in enumerate(documents, 1):
                ids = _fitting(document, number, kind)
                file.write(ids.tobytes())
                lengths.append(len(ids))
        tokens = sum(lengths)
        if not tokens:
            raise InputError(f"There is no token to write to {content}: the data needs a document that is not empty.")
        sizes = np.asarray(lengths, "<i4")
        ends = np.cumsum(sizes, dtype="<i8") * kind.itemsize
        with index_beside.open("wb") as file:
            file.write(_HEAD.pack(_MAGIC, _VERSION, code, len(sizes), len(sizes) + 1))
            for part in (sizes, ends - sizes.astype("<i8") * kind.itemsize, np.arange(len(sizes) + 1, dtype="<i8")):
                file.write(part.tobytes())
    return len(lengths), tokens


def files_of(path: str | Path) -> tuple[Path, Path]:
    """The index and the file of ids that `path` names: one of them, or what both begin with."""
    name = str(path)
    prefix = name[:-4] if name.endswith(SUFFIXES) else name
    return Path(f"{prefix}.idx"), Path(f"{prefix}.bin")


def is_binidx(path: str | Path) -> bool:
    """Whether `path` names token files: by its suffix, or because an index lies there and nothing of that very name."""
    return str(path).endswith(SUFFIXES) or (not Path(path).exists() and files_of(path)[0].is_file())


def _read_index(path: Path, room: int) -> tuple[np.dtype, np.ndarray, np.ndarray]:
    """The ids' type, (n,) lengths and (n,) places of an index, after checking that all lie in `room` bytes of ids."""
    with path.open("rb") as file:
        head = file.read(_HEAD.size)
    if not head.startswith(_MAGIC):
        raise InputError(f"Token index {path} does not begin with {_MAGIC!r}: it is not of Megatron's indexed files.")
    if len(head) < _HEAD.size:
        raise InputError(f"Token index {path} is cut off in its first {_HEAD.size} bytes: fetch or write it anew.")
    _, version, code, count, entries = _HEAD.unpack(head)
    if version != _VERSION:
        raise InputError(f"Token index {path} is of version {version}: only {_VERSION} is known.")
    if code not in _TYPES:
        known = ", ".join(f"{code} ({kind.name})" for code, kind in _TYPES.items())
        raise InputError(f"Token index {path} has ids of type {code}, which are no integers that are known: {known}.")
    size, needed = path.stat().st_size, _HEAD.size + 12 * count + 8 * entries
    if size not in (needed, needed + count):  # a byte more for each sequence tells of its mode, in files of several
        raise InputError(
            f"Token index {path} has {size} bytes, and {count} sequences in {entries - 1} documents take {needed}: it is cut "
            "off or damaged, fetch or write it anew."
        )
    whole = np.memmap(path, np.uint8, "r")
    lengths = np.ndarray((count,), "<i4", whole, _HEAD.size)
    places = np.ndarray((count,), "<i8", whole, _HEAD.size + 4 * count)
    documents = np.ndarray((entries,), "<i8", whole, _HEAD.size + 12 * count)
    _check_places(path, _TYPES[code], lengths, places, room)
    ascending = not (documents[1:] < documents[:-1]).any()
    if not entries or documents[0] != 0 or documents[-1] != count or not ascending:
        raise InputError(f"Token index {path} has documents that do not go from 0 to {count} in order: it is damaged.")
    return _TYPES[code], lengths, places


def _check_places(path: Path, kind: np.dtype, lengths: np.ndarray, places: np.ndarray, room: int) -> None:
    # subtracted, not added: a place near 2^63 would run over
    outside = (lengths < 0) | (places < 0) | (places > room - lengths.astype(np.int64) * kind.itemsize)
    for bad, what in (
        (outside, f"does not lie in the {room} bytes of the .bin file"),
        (places % kind.itemsize != 0, "is askew"),
    ):
        if bad.any():
            number = int(np.argmax(bad))
            raise InputError(
                f"Token index {path}: sequence {number + 1}, {lengths[number]} ids of {kind.itemsize} bytes at byte "
                f"{places[number]}, {what}: the index is damaged, or of another .bin file."
            )


def _fitting(document: Any, number: int, kind: np.dtype) -> np.ndarray:
    """A document's ids as they are written."""
    try:
        ids = np.asarray(document)
    except ValueError:  # lists of different lengths in it
        ids = np.empty((), object)
    if ids.ndim == 1 and not len(ids):
        return np.empty(0, kind)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        shown = " ".join(repr(document).split())
        raise InputError(f"Document {number} is no list of token ids: {shown:.60}.")
    limits = np.iinfo(kind)
    for found in (int(ids.min()), int(ids.max())):
        if not limits.min <= found <= limits.max:
            raise InputError(
                f"Document {number} has the id {found}, which {kind.name} does not hold ({limits.min} to {limits.max}): choose "
                "a larger dtype, such as int32."
            )
    return ids.astype(kind)
