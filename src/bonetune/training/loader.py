"""The examples of each optimizer step, shared out over devices and accumulated forwards."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from bonetune.data import Encoded, EncodedSet
from bonetune.data.batches import Batch, BatchPlan, share_out
from bonetune.data.examples import IGNORED
from bonetune.errors import InputError

Collate = Callable[[Sequence[Encoded]], Batch]


@dataclass(frozen=True)
class Shares:
    """How a step is shared out: over `world` devices, of which this is number `rank`, in `accumulation` forwards each."""

    world: int = 1
    rank: int = 0
    accumulation: int = 1

    def of(self, step: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
        """This device's part of a step, forward by forward; a forward without an example has an empty list."""
        parts = share_out(step, lengths, self.world * self.accumulation)
        return parts[self.rank :: self.world]


@dataclass(frozen=True)
class Share:
    """One forward's examples, and what the whole step counts.

    Args:
        examples: numbers of the examples.
        stand_in: an example to run without labels where there are none: all devices must take part in each forward.
        supervised: of the whole step, on all devices: what its loss is divided by.
        tokens: of the whole step, without padding.
    """

    examples: list[int]
    stand_in: int
    supervised: int
    tokens: int


def shares(step: np.ndarray, lengths: np.ndarray, supervised: np.ndarray, shared: Shares) -> list[Share]:
    """The forwards of one step on one device."""
    shortest = int(step[np.argmin(lengths[step])])
    totals = int(supervised[step].sum()), int(lengths[step].sum())
    return [Share(part, shortest, *totals) for part in shared.of(step, lengths)]


def training_loader(
    examples: EncodedSet, supervised: np.ndarray, plan: BatchPlan, shared: Shares, collate: Collate
) -> "EpochLoader":
    """The batches of each epoch, in the plan's order: the collator's tensors and `supervised`, `tokens`, `examples` as numbers.

    Args:
        examples: the training set.
        supervised: (examples,), what each adds to the number that a step's loss is divided by.
        plan: which examples make a step.
        shared: which of them are this device's.
        collate: examples to tensors.
    """
    sampler = _StepShares(plan, supervised, shared)
    return EpochLoader(
        _Fetched(examples),
        batch_sampler=sampler,  # pyright: ignore[reportArgumentType]  (of shares, which the data set takes whole)
        collate_fn=lambda fetched: _batch(fetched[0], fetched[1], collate),
        generator=torch.Generator(),  # else each epoch would draw from the generator that dropout uses
    )


class EpochLoader(DataLoader):
    """A loader that transformers' loop tells which epoch begins."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]  (always a _StepShares)


class _StepShares(Sampler[Share]):
    def __init__(self, plan: BatchPlan, supervised: np.ndarray, shared: Shares) -> None:
        self.plan, self.supervised, self.shared, self.number = plan, supervised, shared, 0

    def set_epoch(self, epoch: int) -> None:
        self.number = epoch

    def __len__(self) -> int:
        return self.plan.steps * self.shared.accumulation

    def __iter__(self) -> Iterator[Share]:
        for step in self.plan.epoch(self.number):
            yield from shares(step, self.plan.lengths, self.supervised, self.shared)


class _Fetched(Dataset):
    def __init__(self, examples: EncodedSet) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitems__(self, share: Share) -> tuple[Share, list[Encoded]]:
        return share, [self.examples[i] for i in share.examples] or [muted(self.examples[share.stand_in])]


def muted(example: Encoded) -> Encoded:
    """The example with nothing to learn from it: NaN stands for a number to be predicted, which may be any."""
    return replace(example, labels=[math.nan if isinstance(label, float) else IGNORED for label in example.labels])


def _batch(share: Share, examples: list[Encoded], collate: Collate) -> Batch:
    return collate(examples) | {"supervised": share.supervised, "tokens": share.tokens, "examples": share.examples}


def streaming_loader(
    stream: Iterable[Encoded],
    count: Callable[[EncodedSet], np.ndarray],
    *,
    batch_size: int,
    window: int,
    seed: int,
    shared: Shares,
    collate: Collate,
    group_by_length: bool,
) -> DataLoader:
    """The same from a stream without end: it is gone through again and again, `window` examples at a time planned as an epoch.

    Args:
        stream: gives the examples anew each time it is iterated over.
        count: what each example adds to the number that a step's loss is divided by.
        batch_size: examples of a step, on all devices.
        window: examples among which is shuffled, rounded down to whole steps.
        seed: of the order.
        shared: which examples of a step are this device's.
        collate: examples to tensors.
        group_by_length: as in `BatchPlan`.
    """
    # whole steps: examples left over would be the longest ones, and left over again by the next window
    window = max(window // batch_size, 1) * batch_size
    windows = _Windows(stream, count, batch_size, window, seed, shared, collate, group_by_length)
    return DataLoader(windows, batch_size=None, generator=torch.Generator())


class _Windows(IterableDataset):
    def __init__(self, stream: Iterable[Encoded], count: Callable[[EncodedSet], np.ndarray], *settings: Any) -> None:
        self.stream, self.count = stream, count
        self.batch_size, self.window, self.seed, self.shared, self.collate, self.group_by_length = settings

    def __iter__(self) -> Iterator[Batch]:
        buffer: list[Encoded] = []
        number = 0
        while True:
            is_empty = True
            for example in self.stream:
                is_empty = False
                buffer.append(example)
                if len(buffer) == self.window:
                    yield from self._planned(buffer, number)
                    buffer, number = [], number + 1
            if is_empty:
                raise InputError("The stream has come to an end and does not begin again: there is nothing to learn from.")

    def _planned(self, buffer: list[Encoded], number: int) -> Iterator[Batch]:
        """The buffer's steps."""
        examples = EncodedSet(buffer)
        supervised = self.count(examples)
        plan = BatchPlan(examples.lengths, self.batch_size, self.seed, self.group_by_length)
        for step in plan.epoch(number):
            for share in shares(step, examples.lengths, supervised, self.shared):
                members = [buffer[i] for i in share.examples] or [muted(buffer[share.stand_in])]
                batch = _batch(share, members, self.collate)
                yield batch | {"examples": [buffer[i].row for i in share.examples]}
