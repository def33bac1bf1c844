"""Comparisons: fine-tuning methods side by side, each at its own best learning rate, with what chance alone would do."""

from bonetune.experiments.compare import ComparisonPlan, ComparisonResult, MethodPlan, Progress, compare, plan_comparison
from bonetune.experiments.settings import Comparison, load_comparison

__all__ = [
    "Comparison",
    "ComparisonPlan",
    "ComparisonResult",
    "MethodPlan",
    "Progress",
    "compare",
    "load_comparison",
    "plan_comparison",
]
