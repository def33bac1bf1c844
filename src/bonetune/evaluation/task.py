"""What a task is: it reads and checks its data before a model is loaded, and then makes a result of the model's answers."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bonetune.data import read_rows
from bonetune.data.formats import TaskName
from bonetune.errors import InputError
from bonetune.evaluation.ledger import Ledger
from bonetune.evaluation.result import Record, TaskResult
from bonetune.evaluation.trained_with import TrainedWith
from bonetune.models import Loaded

# What a user may choose and not every task can heed. Limits (rows at a time, tokens of an answer) are no choices: a task that
# has no use for one claims nothing by it.
CHOICES = ("dataset_field", "dataset_format", "prompt_template", "few_shot", "judge")
LANGUAGE_MODELS: tuple[TaskName, ...] = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


@dataclass(frozen=True)
class Judge:
    """A model behind an OpenAI-compatible endpoint that grades answers.

    Args:
        url: the endpoint, up to and with its version: http://localhost:8000/v1.
        model: its name there.
        key_variable: the environment variable that holds the key, if one is set.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"


@dataclass(frozen=True)
class Request:
    """What is asked of a task: on which rows, and how the model is run.

    Args:
        data: a file of rows or a data set; None: the protocol's own.
        split: of it; None: the protocol's own.
        limit: score the first so many rows.
        task_type: what the model is for.
        run: what the adapter's training left.
        base: the model's base, where the user names it.
        dataset_field, dataset_format, prompt_template: how rows become prompts, where the user says it.
        batch_size: rows at a time.
        max_new_tokens: longest answer; None: the protocol's own.
        few_shot: a file of rows, or a data set, from which examples are shown; None: the protocol's own.
        judge: who grades, for the tasks whose answers are graded.
        unsafe_code: run programs that the model writes even where nothing holds them back.
        options: how models are loaded: dtype, trust_remote_code.
    """

    data: str | None = None
    split: str | None = None
    limit: int | None = None
    task_type: TaskName = "CAUSAL_LM"
    run: TrainedWith = field(default_factory=TrainedWith)
    base: str | None = None
    dataset_field: tuple[str, ...] | None = None
    dataset_format: str | None = None
    prompt_template: str | None = None
    batch_size: int = 32
    max_new_tokens: int | None = None
    few_shot: str | None = None
    judge: Judge | None = None
    unsafe_code: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def rows(self, task: str, source: str | None = None, split: str = "test") -> list[Record]:
        """The rows to score: those of `data`, else of the task's own `source`.

        Raises `InputError` if there is neither, or they cannot be read.
        """
        if self.data is None and source is None:
            raise InputError(f"{task} needs data: a file of rows, or a data set of the hub.")
        return read_rows(self.data or source or "", self.split or split)[: self.limit]


@dataclass(frozen=True)
class Prepared:
    """A task whose data is read and checked.

    Args:
        items: how many items there are to score.
        identity: what its records depend on besides the model, as JSON writes it.
        run: makes the result, with records that the ledger has from an earlier try taken over.
        named: those of the `CHOICES` that the result's protocol names by itself.
        first: raises `InputError` if something that the task needs besides the model is not to be had; called before a model
            is loaded, and not if the task is done.
    """

    items: int
    identity: dict[str, Any]
    run: Callable[[Loaded, Ledger], TaskResult]
    named: tuple[str, ...] = ()
    first: Callable[[], None] | None = None


@dataclass(frozen=True)
class Task:
    """A task by name.

    Args:
        name: as `--tasks` takes it.
        prepare: reads and checks its data.
        task_types: what kinds of models it is for.
        heeds: those of the `CHOICES` that mean something to it.
    """

    name: str
    prepare: Callable[[Request], Prepared]
    task_types: tuple[TaskName, ...] = LANGUAGE_MODELS
    heeds: tuple[str, ...] = ()


def digest(content: Any) -> str:
    """A fingerprint of rows, or of anything else that JSON can write."""
    text = json.dumps(content, sort_keys=True, default=lambda array: array.tolist())  # token ids may be NumPy's
    return hashlib.sha256(text.encode()).hexdigest()[:16]
