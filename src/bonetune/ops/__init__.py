"""The family's formulas: `reference` states them, `fast` computes them without a transformed weight where none is needed."""

from bonetune.ops.fast import FrozenLinear, adapted_linear
from bonetune.ops.reference import Update, apply, delta, merge, unmerge

__all__ = ["FrozenLinear", "Update", "adapted_linear", "apply", "delta", "merge", "unmerge"]
