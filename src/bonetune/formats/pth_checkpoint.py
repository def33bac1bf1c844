"""An RWKV model's `.pth`, tensor by tensor: what `Checkpoint` is to a folder of safetensors."""

import hashlib
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from bonetune.errors import InputError
from bonetune.torch_files import map_tensors

# So many elements of each tensor's beginning, middle and end go into the fingerprint.
_SAMPLE = 512


class PthCheckpoint:
    """The weights of a model in one of torch's own files, mapped: nothing is in memory that is not asked for.

    Args:
        path: the file.

    Raises:
        AdapterFileError: there is none, it is torn, or holds more than tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors = map_tensors(path)

    @property
    def names(self) -> set[str]:
        """Of the tensors."""
        return set(self.tensors)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of every tensor's name, shape and dtype, and of samples of its values: however the file lays them out."""
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            tensor = self.tensors[name].contiguous()
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            row = tensor.reshape(-1).view(torch.uint8)
            size = _SAMPLE * tensor.element_size()
            last = max(0, len(row) - size)
            for start in (0, last // 2, last):
                digest.update(row[start : start + size].numpy().tobytes())
        return digest.hexdigest()

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor."""
        return self.tensors[name].dtype

    def name_of(self, parameter: str) -> str:
        """The name under which a model's parameter is stored: its own. Raises `InputError` if it is not."""
        if parameter not in self.tensors:
            raise InputError(f"Model {self.path} stores no tensor for its parameter {parameter}.")
        return parameter

    def tensor(self, name: str) -> Tensor:
        """A tensor, in memory of its own."""
        return self.tensors[name].clone()
