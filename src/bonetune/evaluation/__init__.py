"""Trying a model: exact match and loss, each with its interval; a conversation."""

from bonetune.evaluation.chat import Chat
from bonetune.evaluation.evaluate import TaskResult, evaluate
from bonetune.evaluation.statistics import Proportion, most_frequent, sign_test

__all__ = ["Chat", "Proportion", "TaskResult", "evaluate", "most_frequent", "sign_test"]
