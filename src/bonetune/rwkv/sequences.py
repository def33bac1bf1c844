"""Sequences of different lengths as one row of tokens, without padding: where each begins, and how it is cut into chunks.

Everything in an RWKV model but the token shift and the WKV operator treats each token for itself. So a model runs on (tokens,
features), and a batch that is padded, packed or neither differs in `Sequences` alone. What goes by the lengths, which change
from batch to batch, is not compiled.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor, nn

from bonetune.errors import InputError


@dataclass(frozen=True)
class Sequences:
    """Sequences that lie one after the other in a row of tokens.

    Args:
        lengths: tokens of each.
        device: of the row.
        kept: (tokens,), int64: where each token of the row stands in the flattened (batch, length) that it was taken from;
            None: the row is that, with nothing left out.
    """

    lengths: tuple[int, ...]
    device: torch.device
    kept: Tensor | None = None

    @classmethod
    def of(cls, shape: torch.Size, device: torch.device, mask: Tensor | None, boundaries: Tensor | None) -> "Sequences":
        """Those of a batch.

        Args:
            shape: (batch, length).
            device: of the batch.
            mask: (batch, at least length), not 0 where there is a token; its last columns count. None: tokens everywhere.
            boundaries: (sequences + 1,), where the sequences of a packed row begin and the last one ends; of batches of one
                row.

        Raises:
            InputError: a mask or boundaries of another shape, or both.
        """
        rows, length = shape
        if boundaries is not None:
            lengths = tuple(boundaries.diff().tolist())
            if rows != 1 or sum(lengths) != length or min(lengths, default=0) < 0 or int(boundaries[0]):
                raise InputError(f"cu_seq_lens_q {boundaries.tolist()} does not divide a batch of shape {tuple(shape)}.")
            if mask is not None and not mask.all():
                raise InputError("A packed row (cu_seq_lens_q) has no padding: leave attention_mask out.")
            return cls(lengths, device)
        if mask is None:
            return cls((length,) * rows, device)
        if mask.dim() != 2 or mask.shape[0] != rows or mask.shape[1] < length:
            raise InputError(f"attention_mask has shape {tuple(mask.shape)}, and the batch {tuple(shape)}: one entry a token.")
        there = mask[:, mask.shape[1] - length :] != 0
        if bool(there.all()):
            return cls((length,) * rows, device)
        return cls(tuple(there.sum(1).tolist()), device, there.flatten().nonzero().squeeze(-1))

    @property
    def starts(self) -> tuple[int, ...]:
        """The first token of each, and of one more that would follow."""
        return (0, *accumulate(self.lengths))

    @cached_property
    def boundaries(self) -> Tensor:
        """`starts` as a tensor, int64."""
        return torch.tensor(self.starts, device=self.device)

    @cached_property
    def _first_and_last(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the sequences that are not empty: their numbers, their first and their last tokens."""
        some = [number for number, length in enumerate(self.lengths) if length]
        starts = self.starts
        rows = ([*some], [starts[number] for number in some], [starts[number + 1] - 1 for number in some])
        numbers, first, last = (torch.tensor(row, dtype=torch.int64, device=self.device) for row in rows)
        return numbers, first, last

    def flat(self, batch: Tensor) -> Tensor:
        """(batch, length, ...) to (tokens, ...)."""
        row = batch.flatten(0, 1)
        return row if self.kept is None else row[self.kept]

    def unflat(self, row: Tensor, shape: torch.Size) -> Tensor:
        """(tokens, ...) to (batch, length, ...), with zeros where there is no token."""
        if self.kept is not None:
            row = row.new_zeros(shape.numel(), *row.shape[1:]).index_copy(0, self.kept, row)
        return row.unflatten(0, shape)

    @torch.compiler.disable()
    def shifted(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        """What stands before each token, in its sequence.

        Args:
            x: (tokens, features).
            before: (sequences, features), what stands before each first token; None: zeros.
        """
        if not len(x):
            return x
        numbers, first, _ = self._first_and_last
        found = x.new_zeros(len(numbers), x.shape[1]) if before is None else before.to(x.dtype)[numbers]
        if len(numbers) == 1:
            return torch.cat([found, x[:-1]])
        return x.roll(1, 0).index_copy(0, first, found)

    @torch.compiler.disable()
    def last(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        """Each sequence's last token, or its row of `before` if it is empty: (tokens, features) to (sequences, features)."""
        numbers, _, last = self._first_and_last
        if len(numbers) == len(self.lengths):
            return x[last]
        found = x.new_zeros(len(self.lengths), x.shape[1]) if before is None else before.to(x.dtype)
        return found.index_copy(0, numbers, x[last])

    def cut(self, x: Tensor, size: int) -> Tensor:
        """Chunks of `size` tokens, each sequence filled up with zeros: (tokens, heads, n) to (chunks, heads, size, n)."""
        missing = [-length % size for length in self.lengths]
        if any(missing):
            parts = zip(x.split(self.lengths), missing, strict=True)
            x = torch.cat([nn.functional.pad(part, (0, 0, 0, 0, 0, zeros)) for part, zeros in parts])
        return x.unflatten(0, (-1, size)).transpose(1, 2).contiguous()

    def joined(self, chunks: Tensor) -> Tensor:
        """What was `cut`, without the fillings: (chunks, heads, size, n) to (tokens, heads, n)."""
        size = chunks.shape[2]
        x = chunks.transpose(1, 2).flatten(0, 1)
        missing = [-length % size for length in self.lengths]
        if not any(missing):
            return x
        parts = x.split([length + zeros for length, zeros in zip(self.lengths, missing, strict=True)])
        return torch.cat([part[:length] for part, length in zip(parts, self.lengths, strict=True)])

    def chunk_counts(self, size: int) -> tuple[int, ...]:
        """Chunks of `size` tokens that each sequence takes."""
        return tuple(-(-length // size) for length in self.lengths)


def boundaries_of(positions: Tensor) -> Tensor | None:
    """Where the sequences of a packed row begin, (sequences + 1,), if its positions say that there are several.

    Args:
        positions: (batch, length), int64; in a packed row they begin at 0 with each sequence.
    """
    if positions.shape[0] != 1:
        return None
    begins = (positions[0] == 0).nonzero().squeeze(-1)
    if len(begins) < 2 or int(begins[0]):
        return None
    return torch.cat([begins, begins.new_tensor([positions.shape[1]])])


def turns(counts: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The order in which chunks are gone through: turn by turn, the sequences that have one more, and which it is.

    Args:
        counts: chunks of each sequence, which lie one sequence after the other.
    """
    starts = [0, *accumulate(counts)]
    found = []
    for turn in range(max(counts, default=0)):
        members = [number for number, count in enumerate(counts) if count > turn]
        found.append((members, [starts[number] + turn for number in members]))
    return found
