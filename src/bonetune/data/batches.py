"""Which examples make which optimizer step, and how they become tensors.

The plan follows from the seed, the epoch and the examples' lengths alone: neither the number of devices nor the accumulation of
gradients changes which examples a step learns from, only how they are shared out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bonetune.data.examples import IGNORED, Encoded

Batch = dict[str, Any]
# Steps whose examples are sorted together where like lengths are to meet: enough for little padding, few enough to stay random.
WINDOW = 64


@dataclass(frozen=True)
class BatchPlan:
    """The steps of each epoch.

    Args:
        lengths: (examples,), tokens of each example.
        batch_size: examples of one optimizer step, on all devices together; an epoch's last step may have fewer.
        seed: of the order.
        group_by_length: whether the examples of a step are to have like lengths. Within windows of `WINDOW` steps of a shuffled
            epoch, examples are sorted by length and cut into steps, and the steps are shuffled.
        sources: (examples,), number of the data set that each example is from.
        weights: share of each data set, none of which is empty; None: as large as it is. A data set gives as many examples as
            its share of all epochs so far is, rounded, going through its own in a new order each time it is through, epochs
            included: nothing is seen twice before all else of it was seen once.
    """

    lengths: np.ndarray
    batch_size: int
    seed: int
    group_by_length: bool = False
    sources: np.ndarray | None = None
    weights: tuple[float, ...] | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        return -(-len(self.lengths) // self.batch_size)

    def epoch(self, number: int) -> list[np.ndarray]:
        """The examples' numbers in each step of epoch `number` (from 0)."""
        random = np.random.default_rng([self.seed, number])
        order = random.permutation(self._members(number))
        cuts = np.arange(self.batch_size, len(order), self.batch_size)
        if not self.group_by_length:
            return np.split(order, cuts)
        window = WINDOW * self.batch_size
        pieces = [order[start : start + window] for start in range(0, len(order), window)]
        steps = np.split(np.concatenate([piece[np.argsort(self.lengths[piece], kind="stable")] for piece in pieces]), cuts)
        full = [step for step in steps if len(step) == self.batch_size]
        rest = steps[len(full) :]  # a short step stays the last one, as everywhere
        return [full[i] for i in random.permutation(len(full))] + rest

    def _members(self, number: int) -> np.ndarray:
        """The examples of an epoch, in no particular order."""
        if self.weights is None or self.sources is None:
            return np.arange(len(self.lengths))
        before, after = (_quotas(self.weights, epochs * len(self.lengths)) for epochs in (number, number + 1))
        return np.concatenate(
            [
                _cycled(np.flatnonzero(self.sources == source), start, stop - start, self.seed + source)
                for source, (start, stop) in enumerate(zip(before, after, strict=True))
            ]
        )


def _quotas(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers in proportion to `weights` that sum to `total`, none of which falls when `total` grows.

    This is Webster's method; by largest remainders, a number may fall. Fractions make ties exact.
    """
    half, parts = Fraction(1, 2), [Fraction(weight) for weight in weights]
    quotas = [int(total * part / sum(parts) + half) for part in parts]
    while sum(quotas) < total:
        quotas[min(range(len(parts)), key=lambda n: ((quotas[n] + half) / parts[n], n))] += 1
    while sum(quotas) > total:
        quotas[max(range(len(parts)), key=lambda n: ((quotas[n] - half) / parts[n], n))] -= 1
    return quotas


def _cycled(members: np.ndarray, start: int, count: int, seed: int) -> np.ndarray:
    """`count` entries from `start` on of: `members` in one random order, then in another, and so on."""
    rounds = range(start // len(members), -(-(start + count) // len(members)))
    orders = [np.random.default_rng([seed, len(members), turn]).permutation(members) for turn in rounds]
    skipped = start % len(members)
    return np.concatenate([members[:0], *orders])[skipped : skipped + count]


def share_out(step: Sequence[int] | np.ndarray, lengths: np.ndarray, parts: int) -> list[list[int]]:
    """A step's examples in `parts` parts of equal number (one less in some), with like sums of lengths.

    The examples, longest first, are dealt to and fro. A part may be empty if there are fewer examples than parts.
    """
    step = np.asarray(step)
    dealt: list[list[int]] = [[] for _ in range(parts)]
    for turn, example in enumerate(step[np.argsort(-lengths[step], kind="stable")].tolist()):
        lap, place = divmod(turn, parts)
        dealt[place if lap % 2 == 0 else parts - 1 - place].append(example)
    return dealt


def padded(pad_token_id: int, *, pad_labels: bool = True) -> Callable[[Sequence[Encoded]], Batch]:
    """A collator: right-padded `input_ids` and `attention_mask`, (batch, longest), int64, and `labels`.

    Padding is masked by position, never by id, so that a padding token that is also the end of text stays supervised.

    Args:
        pad_token_id: what fills up `input_ids`.
        pad_labels: whether labels are sequences, padded with `IGNORED`; else they are one number an example: (batch,), int64 or
            float32.
    """

    def batch(examples: Sequence[Encoded]) -> Batch:
        return {
            "input_ids": _filled([e.input_ids for e in examples], pad_token_id),
            "attention_mask": _filled([[1] * len(e.input_ids) for e in examples], 0),
            "labels": _filled([e.labels for e in examples], IGNORED) if pad_labels else _numbers(examples),
        }

    return batch


def _numbers(examples: Sequence[Encoded]) -> Tensor:
    values = torch.tensor([e.labels[0] for e in examples])
    return values if values.dtype == torch.int64 else values.float()


def _filled(rows: Sequence[Sequence[int | float]], value: int) -> Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def packed(examples: Sequence[Encoded]) -> Batch:
    """A collator that lays examples end to end in one row, without padding.

    `input_ids`, `labels` and `position_ids`, which begin at 0 with each example, are (1, sum of lengths), int64; the first
    token of an example is nobody's to predict. `cu_seq_lens_q` and `_k`, (examples + 1,), int32, say where each begins
    and the last one ends, `max_length_q` and `_k` how long the longest is: transformers' names for what attention needs.
    """
    lengths = [len(e.input_ids) for e in examples]
    starts = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    return {
        "input_ids": torch.tensor([[token for e in examples for token in e.input_ids]]),
        "labels": torch.tensor([[label for e in examples for label in (IGNORED, *e.labels[1:])]]),
        "position_ids": torch.tensor([[position for length in lengths for position in range(length)]]),
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }
