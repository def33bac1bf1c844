"""Trying a model: tasks with their scores, intervals and records; a conversation."""

from bonetune.evaluation.chat import Chat
from bonetune.evaluation.evaluate import TASKS, evaluate
from bonetune.evaluation.result import TaskResult
from bonetune.evaluation.statistics import Proportion, most_frequent, sign_test
from bonetune.evaluation.task import Judge

__all__ = ["TASKS", "Chat", "Judge", "Proportion", "TaskResult", "evaluate", "most_frequent", "sign_test"]
