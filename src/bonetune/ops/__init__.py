"""The family's formulas: `reference` states them, `fast` computes them without a transformed weight where none is needed."""

from bonetune.ops.fast import FrozenLinear, PlainWeight, adapted_linear
from bonetune.ops.pieces import for_rows, merge_rows, row_pieces
from bonetune.ops.reference import Rows, Update, apply, delta, merge, unmerge

__all__ = [
    "FrozenLinear",
    "PlainWeight",
    "Rows",
    "Update",
    "adapted_linear",
    "apply",
    "delta",
    "for_rows",
    "merge",
    "merge_rows",
    "row_pieces",
    "unmerge",
]
