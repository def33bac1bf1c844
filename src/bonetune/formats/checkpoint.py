"""A base model's safetensors files, tensor by tensor: nothing is loaded that is not asked for."""

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bonetune.errors import InputError, first_line
from bonetune.files import read_config
from bonetune.formats.pth_checkpoint import PthCheckpoint
from bonetune.rwkv.weights import is_pth

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
# As safetensors names them in a header.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_MOST_HEADER_BYTES = 100_000_000  # as the safetensors library has it
# So much of each tensor's beginning, middle and end goes into the fingerprint.
_SAMPLE_BYTES = 1 << 10
_READ_BYTES = 1 << 22


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: bytes `start` to `stop` of it, counted from the file's beginning."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself, tensors in the order of their bytes."""

    tensors: dict[str, Stored]
    metadata: dict[str, str]
    data_start: int


class Checkpoint:
    """The weights of a model in the Hugging Face layout: model.safetensors, or several files with an index.

    Args:
        folder: where config.json and the weights lie.

    Raises:
        InputError: no safetensors weights, files that are missing, torn or forged, or an index that does not match them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = self._files()
        self.headers = {file: read_header(folder / file) for file in self.files}
        self.stored: dict[str, Stored] = {}
        for header in self.headers.values():
            if twice := header.tensors.keys() & self.stored.keys():
                raise InputError(f"Model {folder} has the tensor {min(twice)} in two files.")
            self.stored |= header.tensors
        self._check_index()

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return read_config(self.folder / "config.json")

    @cached_property
    def fingerprint(self) -> str:
        """A hash of every file's header and of samples of every tensor: another model, or another state of it, has another."""
        digest = hashlib.sha256()
        for file in self.files:
            header = self.headers[file]
            with (self.folder / file).open("rb", buffering=0) as content:
                digest.update(content.read(header.data_start))
                for stored in header.tensors.values():
                    last = max(stored.start, stored.stop - _SAMPLE_BYTES)
                    for at in (stored.start, (stored.start + last) // 2, last):
                        content.seek(at)
                        digest.update(content.read(min(_SAMPLE_BYTES, stored.stop - at)))
        return digest.hexdigest()

    def same_values(self, one: str, other: str) -> bool:
        """Whether two names are stored with the same bytes, which are read a part at a time."""
        a, b = self.stored[one], self.stored[other]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        with (self.folder / a.file).open("rb") as left, (self.folder / b.file).open("rb") as right:
            left.seek(a.start)
            right.seek(b.start)
            sizes = (min(_READ_BYTES, a.stop - at) for at in range(a.start, a.stop, _READ_BYTES))
            return all(left.read(size) == right.read(size) for size in sizes)

    @property
    def names(self) -> set[str]:
        """Of the stored tensors."""
        return set(self.stored)

    def dtype(self, name: str) -> torch.dtype:
        """Of the tensor stored under that name."""
        return DTYPES[self.stored[name].dtype]

    def name_of(self, parameter: str) -> str:
        """The stored name of a model's parameter: its own, or without the name of the model's body (`transformer.h.0...`).

        Raises:
            InputError: it is stored under no name that can be found so, or not at all.
        """
        if parameter in self.stored:
            return parameter
        shorter = parameter.partition(".")[2]
        if shorter in self.stored:
            return shorter
        longer = [name for name in self.stored if name.endswith(f".{parameter}") and "." not in name[: -len(parameter) - 1]]
        if len(longer) == 1:
            return longer[0]
        raise InputError(f"Model {self.folder} stores no tensor for its parameter {parameter}.")

    def tensor(self, name: str) -> Tensor:
        """The tensor stored under that name, read from its file into memory."""
        stored = self.stored[name]
        with (self.folder / stored.file).open("rb") as file:
            file.seek(stored.start)
            content = bytearray(file.read(stored.stop - stored.start))
        if not content:
            return torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
        return torch.frombuffer(content, dtype=DTYPES[stored.dtype]).reshape(stored.shape)

    def _files(self) -> list[str]:
        if (self.folder / SINGLE_FILE).is_file():  # which transformers takes, whatever an index beside it says
            return [SINGLE_FILE]
        if not (self.folder / INDEX_FILE).is_file():
            raise InputError(f"Model {self.folder} has no safetensors weights ({SINGLE_FILE}, or files with {INDEX_FILE}).")
        index = read_config(self.folder / INDEX_FILE).get("weight_map")
        if not isinstance(index, dict) or not index or not all(isinstance(file, str) for file in index.values()):
            raise InputError(f"{self.folder / INDEX_FILE} has no weight_map of tensors to files.")
        files = sorted(set(index.values()))
        for file in files:
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise InputError(f"{self.folder / INDEX_FILE} names a file outside its folder, or no safetensors: {file!r}.")
        if missing := [file for file in files if not os.path.isfile(self.folder / file)]:  # no error for a name too long
            raise InputError(f"Model {self.folder} lacks {len(missing)} of its {len(files)} files: {', '.join(missing)}.")
        return files

    def _check_index(self) -> None:
        if self.files == [SINGLE_FILE]:
            return
        index = read_config(self.folder / INDEX_FILE)["weight_map"]
        wrong = [name for name, file in index.items() if name not in self.stored or self.stored[name].file != file]
        if wrong:
            raise InputError(f"Model {self.folder}: {len(wrong)} tensors are not in the file of the index, {wrong[0]} for one.")


def read_header(path: Path) -> Header:
    """What a safetensors file says of itself.

    Raises:
        InputError: it is torn or forged: a header that is too large or no JSON, tensors that overlap, leave gaps, reach beyond
            the file or are of other sizes than their shapes say.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            raw = b"" if length > min(size - 8, _MOST_HEADER_BYTES) else file.read(length)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}") from error
    if not raw:
        raise InputError(f"{path} is not a whole safetensors file: its header would take {length} of its {size} bytes.")
    try:
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_name_twice)
        metadata = content.pop("__metadata__", {})
        tensors = [(str(name), _stored(path, entry, 8 + length)) for name, entry in content.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is not a whole safetensors file: its header is wrong ({first_line(error)}).") from error
    tensors.sort(key=lambda item: (item[1].start, item[1].stop))
    end = 8 + length
    for name, stored in tensors:
        if stored.start != end:
            raise InputError(f"{path} is not a safetensors file: tensor {name} overlaps another, or leaves a gap before it.")
        end = stored.stop
    if end != size:
        raise InputError(f"{path} is not a whole safetensors file: its tensors end at byte {end} of {size}.")
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{path} is not a safetensors file: its metadata are not texts by name.")
    return Header(dict(tensors), metadata, 8 + length)


def _stored(path: Path, entry: dict[str, Any], data_start: int) -> Stored:
    dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):  # true is an int, too
        raise ValueError("a size or an offset that is no whole number")
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}")
    elements = 1
    for side in shape:
        elements *= side
    if stop - start != elements * DTYPES[dtype].itemsize:
        raise ValueError(f"shape {shape} of {dtype} does not take {stop - start} bytes")
    return Stored(path.name, dtype, shape, data_start + start, data_start + stop)


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name that is given twice")
    return content


def open_checkpoint(name: str, *, fetch: bool = True) -> Checkpoint | PthCheckpoint:
    """The weights of a model, by its name: a folder, an id on the hub, or an RWKV `.pth`. Errors as theirs."""
    return PthCheckpoint(Path(name)) if is_pth(name) else Checkpoint(local_folder(name, fetch=fetch))


def fingerprint_of(name: str, *, fetch: bool = False) -> str | None:
    """The fingerprint of a model, of its safetensors or `.pth`; None if it has none, or is not here and `fetch` forbids it."""
    try:
        return open_checkpoint(name, fetch=fetch).fingerprint
    except InputError:
        return None


def local_folder(name: str, *, fetch: bool = True) -> Path:
    """The folder of a model: as named, or where the hub's files are kept, fetched if need be and `fetch` allows it.

    Raises:
        InputError: there is no such model.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=not fetch))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise InputError(f"Model {name!r} cannot be had: {first_line(error)}") from error
