"""Measuring a model: generated answers, exact match, loss, each with its interval."""

from bonetune.evaluation.evaluate import TaskResult, evaluate
from bonetune.evaluation.generation import generate
from bonetune.evaluation.statistics import Proportion, most_frequent, sign_test

__all__ = ["Proportion", "TaskResult", "evaluate", "generate", "most_frequent", "sign_test"]
