"""Examples as training sees them: token ids with labels, and a data set of them held flat."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bonetune.errors import InputError

IGNORED = -100  # the label of a token that is not supervised, as everywhere in transformers
_NAMES: tuple[str, ...] = ("ids", "labels", "lengths", "labelled", "rows")


@dataclass(frozen=True)
class Encoded:
    """One example.

    Args:
        input_ids: token ids.
        labels: for a causal language model, the token ids again where supervised, else `IGNORED`; for a sequence-to-sequence
            model, the ids of the answer; for a classifier, one number: the class, or what is to be predicted.
        row: its row's number in its source, from 1.
    """

    input_ids: list[int]
    labels: list[int] | list[float]
    row: int = 0

    @property
    def supervised(self) -> int:
        """Number of tokens the loss of a causal language model is computed on: a sequence's first is never predicted."""
        return sum(label != IGNORED for label in self.labels[1:])


class EncodedSet(Sequence[Encoded]):
    """Examples in a few flat arrays: some bytes a token, whatever their number.

    Attributes:
        lengths: (examples,), int64: tokens of each.
        labelled: (examples,), int64: labels of each.
        supervised: (examples,), int64: `Encoded.supervised` of each.
        rows: (examples,), int64: the row's number of each.
    """

    def __init__(self, examples: Iterable[Encoded]) -> None:
        ids, labels, id_counts, label_counts, rows = [], [], [], [], []
        for example in examples:
            ids.append(np.asarray(example.input_ids, np.int32))
            labels.append(np.asarray(example.labels))
            id_counts.append(len(example.input_ids))
            label_counts.append(len(example.labels))
            rows.append(example.row)
        kind = np.float64 if any(part.dtype.kind == "f" for part in labels) else np.int32
        self._set(
            np.concatenate([np.empty(0, np.int32), *ids]),
            np.concatenate([np.empty(0, kind), *labels]).astype(kind),
            np.asarray(id_counts, np.int64),
            np.asarray(label_counts, np.int64),
            np.asarray(rows, np.int64),
        )

    def _set(self, ids: np.ndarray, labels: np.ndarray, lengths: np.ndarray, labelled: np.ndarray, rows: np.ndarray) -> None:
        self._ids, self._labels, self.lengths, self.labelled, self.rows = ids, labels, lengths, labelled, rows
        self._starts = np.concatenate([[0], np.cumsum(lengths)])
        self._label_starts = np.concatenate([[0], np.cumsum(labelled)])
        supervised = np.concatenate([[0], np.cumsum(labels != IGNORED)])
        firsts = np.zeros(len(lengths), np.int64)
        filled = labelled > 0
        firsts[filled] = labels[self._label_starts[:-1][filled]] != IGNORED
        self.supervised = supervised[self._label_starts[1:]] - supervised[self._label_starts[:-1]] - firsts

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> "EncodedSet": ...
    def __getitem__(self, index: int | slice) -> "Encoded | EncodedSet":
        if isinstance(index, slice):
            return self.take(range(*index.indices(len(self))))
        i = range(len(self))[index]
        ids = self._ids[self._starts[i] : self._starts[i + 1]].tolist()
        labels = self._labels[self._label_starts[i] : self._label_starts[i + 1]].tolist()
        return Encoded(ids, labels, int(self.rows[i]))

    def __iter__(self) -> Iterator[Encoded]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EncodedSet) and all(
            np.array_equal(a, b) for a, b in zip(self._arrays(), other._arrays(), strict=True)
        )

    __hash__ = None  # pyright: ignore[reportAssignmentType]  (compared by content)

    def _arrays(self) -> tuple[np.ndarray, ...]:
        return self._ids, self._labels, self.lengths, self.labelled, self.rows

    def take(self, indices: Sequence[int] | np.ndarray) -> "EncodedSet":
        """The examples with these numbers, in this order."""
        indices = np.asarray(indices, np.int64)
        ids = [self._ids[self._starts[i] : self._starts[i + 1]] for i in indices]
        labels = [self._labels[self._label_starts[i] : self._label_starts[i + 1]] for i in indices]
        return self._of(
            np.concatenate([self._ids[:0], *ids]),
            np.concatenate([self._labels[:0], *labels]),
            *(array[indices] for array in (self.lengths, self.labelled, self.rows)),
        )

    @classmethod
    def joined(cls, parts: Sequence["EncodedSet"]) -> "EncodedSet":
        """The examples of one or more sets, one set after the other."""
        return cls._of(*(np.concatenate(arrays) for arrays in zip(*(part._arrays() for part in parts), strict=True)))

    def ids_at(self, place: int) -> np.ndarray:
        """(examples,): the id of each example's token number `place`, -1 where it is shorter."""
        if not len(self._ids):
            return np.full(len(self), -1)
        places = np.minimum(self._starts[:-1] + place, len(self._ids) - 1)
        return np.where(self.lengths > place, self._ids[places], -1)

    def last_labels(self) -> np.ndarray:
        """(examples,): the last label of each, `IGNORED` where there is none."""
        if not len(self._labels):
            return np.full(len(self), IGNORED)
        return np.where(self.labelled > 0, self._labels[self._label_starts[1:] - 1], IGNORED)

    def digests(self) -> list[bytes]:
        """16 bytes for each example, equal where ids and labels are."""
        found = []
        for i in range(len(self)):
            digest = hashlib.blake2b(self._ids[self._starts[i] : self._starts[i + 1]].tobytes(), digest_size=16)
            digest.update(b"labels" + self._labels[self._label_starts[i] : self._label_starts[i + 1]].tobytes())
            found.append(digest.digest())
        return found

    def fingerprint(self) -> str:
        """SHA-256 of all that the examples are."""
        digest = hashlib.sha256()
        for array in self._arrays():
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def save(self, path: Path, notes: dict[str, str] | None = None) -> None:
        """Write the arrays, and `notes` about them, to a safetensors file."""
        notes = notes or {}
        arrays = dict(zip(_NAMES, self._arrays(), strict=True))
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        save_file(tensors, path, notes | {"sha256": _sha256(arrays, notes)})

    @classmethod
    def load(cls, path: Path) -> tuple["EncodedSet", dict[str, str]]:
        """The examples and notes that `save` wrote.

        Raises `InputError` if the file holds something else, or no longer every bit of it.
        """
        try:
            with safe_open(path, "np") as file:
                notes = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in _NAMES}
        except (OSError, SafetensorError) as error:
            raise InputError(f"File {path} holds no examples: {error}") from error
        if notes.pop("sha256", None) != _sha256(arrays, notes):
            raise InputError(f"File {path} is damaged: its examples are not those that were written.")
        return cls._of(*arrays.values()), notes

    @classmethod
    def _of(cls, *arrays: np.ndarray) -> "EncodedSet":
        made = cls.__new__(cls)
        made._set(*arrays)
        return made


def _sha256(arrays: dict[str, np.ndarray], notes: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(notes, sort_keys=True).encode())
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()
