"""Merging a part of a weight's rows at a time: what is written out in between fits a CPU's cache, or a file's reader.

Every variant's W' has in each of its rows only values of those rows of W (for bat-left: of the row of blocks that they are
in), so W' is the parts' results one below the other, bit for bit.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bonetune.ops.reference import Update, merge
from bonetune.spec import ShardSpec

# So many elements of W are merged at a time, about: their float32 values and those of the update fit a CPU's cache.
_ELEMENTS = 1 << 18


def row_pieces(out_features: int, in_features: int, specs: Sequence[ShardSpec], elements: int = _ELEMENTS) -> Iterator[slice]:
    """Ranges of rows of W (out, in) that can be merged each on its own, of about `elements` elements.

    Those of BAT variants end where blocks end.
    """
    unit = math.lcm(*(spec.r for spec in specs if spec.blockwise))
    step = unit * max(1, elements // max(1, unit * in_features))
    for start in range(0, out_features, step):
        yield slice(start, min(start + step, out_features))


def for_rows(update: Update, rows: slice) -> Update:
    """What an update is for some rows of W alone: `merge(W[rows], [for_rows(u, rows)])` is `merge(W, [u])[rows]`.

    Args:
        update: of the whole W.
        rows: one of `row_pieces`.
    """
    theta, spec = update.theta, update.spec
    match spec.variant:
        case "bone":
            return update._replace(theta=theta[..., rows])
        case "mini":  # a range may begin and end anywhere in a repetition of D
            columns = torch.arange(rows.start, rows.stop, device=theta.device) % theta.shape[-1]
            return update._replace(theta=theta[..., columns], spec=ShardSpec("bone", spec.r))
        case "bat" | "bat-left":
            return update._replace(theta=theta[..., rows.start // spec.r : rows.stop // spec.r, :, :])
        case _:
            return update


def merge_rows(weight: Tensor, updates: Sequence[Update], first: int, into: Tensor) -> tuple[float, float]:
    """Write `merge(W, updates)` of some rows into `into`, rounded once to its dtype.

    Args:
        weight: those rows of W (..., rows, in); leading dimensions as in `delta`.
        updates: the adapters' updates of the whole W, their tensors in float32 (float64 if W is).
        first: the number of the first of the rows, a multiple of every BAT update's r.
        into: (..., rows, in).

    Returns:
        The least and the largest value before rounding; NaN if there is one.
    """
    lowest, highest = math.inf, -math.inf
    wide = torch.promote_types(weight.dtype, torch.float32)
    *leading, number, in_features = weight.shape
    for piece in row_pieces(number, math.prod(leading) * in_features, [update.spec for update in updates]):
        rows = slice(first + piece.start, first + piece.stop)
        merged = merge(weight[..., piece, :].to(wide), [for_rows(update, rows) for update in updates])
        into[..., piece, :].copy_(merged)
        low, high = torch.aminmax(merged)
        lowest, highest = _least(lowest, low.item()), -_least(-highest, -high.item())
    return lowest, highest


def _least(a: float, b: float) -> float:
    return math.nan if math.isnan(a) or math.isnan(b) else min(a, b)
