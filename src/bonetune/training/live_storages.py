"""Which storages live when: a training step is run on tensors without values, and every allocation is written down."""

import itertools
import math
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

_MASKED = {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_}


class LiveStorages(TorchDispatchMode):
    """While it is open, notes each storage that an operation returns, and when it is freed.

    What a kernel takes and frees inside one operation is not seen. To be opened last, around `WithoutValues` if there is one.
    """

    def __init__(self) -> None:
        super().__init__()
        self._bytes: list[int] = []  # of each storage, in the order of their first appearance
        self._events: list[int] = []  # i: storage i came; ~i: it went
        self._categories: dict[int, str] = {}
        self._numbers = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._number(tensor)
        return result

    def assign(self, tensors: Iterable[Tensor], category: str) -> None:
        """Count the storages of `tensors` as `category`, over their whole lives."""
        for tensor in tensors:
            self._categories[self._number(tensor)] = category

    def assign_living(self, category: str) -> None:
        """Count everything that lives now and has no category as `category`."""
        for number in self._living(len(self._events)):
            self._categories.setdefault(number, category)

    def highest(self, up_to: float = math.inf, without: Iterable[str] = ()) -> int:
        """Most bytes that live at once in storages of at most `up_to` bytes, those of some categories left out."""
        left_out = set(without)
        counted = [
            size if size <= up_to and self._categories.get(number) not in left_out else 0
            for number, size in enumerate(self._bytes)
        ]
        changes = (counted[event] if event >= 0 else -counted[~event] for event in self._events)
        return max(itertools.accumulate(changes, initial=0))

    def peak(self) -> dict[str, int]:
        """Bytes by category at the moment when most bytes live; those of no category under `transient`."""
        total, highest, moment = 0, 0, 0
        for time, event in enumerate(self._events, 1):
            total += self._bytes[event] if event >= 0 else -self._bytes[~event]
            if total > highest:
                highest, moment = total, time
        found: dict[str, int] = {}
        for number in self._living(moment):
            category = self._categories.get(number, "transient")
            found[category] = found.get(category, 0) + self._bytes[number]
        return found

    def _number(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        number = self._numbers.get(storage)
        if number is None:
            number = self._numbers[storage] = len(self._bytes)
            self._bytes.append(0 if hasattr(storage, "stands_for") else storage.nbytes())
            self._events.append(number)
            weakref.finalize(storage, self._events.append, ~number).atexit = False
        return number

    def _living(self, moment: int) -> list[int]:
        living: dict[int, None] = {}
        for event in self._events[:moment]:
            if event >= 0:
                living[event] = None
            else:
                living.pop(~event)
        return list(living)


class WithoutValues(TorchDispatchMode):
    """While it is open, floating tensors have shapes and no values: nothing is allocated or computed.

    Integers and booleans keep theirs, for the control flow (positions, masks, what is supervised) depends on them. They lie in
    host memory, whichever device the floating ones are said to be on.
    """

    def __init__(self) -> None:
        super().__init__()
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        if tensors and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return func(*args, **kwargs)
        if func.overloadpacket in _MASKED:  # a mask's number of places is a value, too
            args = (args[0], [place for index in args[1] for place in _places(index)], *args[2:])
        args, kwargs = tree_map_only(Tensor, self._without_values, (args, kwargs))
        with self._mode:
            result = func(*args, **kwargs)
        if tensors or not isinstance(result, Tensor) or result.is_floating_point():
            return result
        return func(*args, **kwargs)

    def _without_values(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        with self._mode:
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        storage: Any = fake.untyped_storage()
        storage.stands_for = tensor.untyped_storage()  # which lives as long, and whose bytes are counted
        return fake


def _places(index: Tensor | None) -> Iterable[Tensor | None]:
    if index is None or index.dtype != torch.bool or isinstance(index, FakeTensor):
        return (index,)
    return index.nonzero(as_tuple=True)
