"""A run of a comparison, and what came of it: one file a run, which is there once the run is done."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bonetune.errors import InputError
from bonetune.evaluation import TaskResult
from bonetune.evaluation.ledger import file_name, read_result
from bonetune.files import write_json, write_json_lines
from bonetune.training.folder import METRICS_FILE
from bonetune.training.report import read_metrics

OUTCOME_FILE, ITEMS_FOLDER = "outcome.json", "items"


def finite(value: float | None) -> float | None:
    """A value, unless it is not finite, which JSON cannot hold."""
    return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class Trial:
    """One training run: a method at a learning rate, with a seed.

    Args:
        method: the method's name in the comparison.
        learning_rate: the peak.
        seed: of data order and initialization.
    """

    method: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Its folder's name."""
        return f"{self.method}-lr{self.learning_rate!r}-seed{self.seed}"


@dataclass(frozen=True)
class Scaled:
    """The trained update, multiplied by `scale`: what is left of what was learned, and of what was forgotten.

    Args:
        scale: 0 is the base model, 1 the trained one.
        score: of the comparison's first test; None: it is not finite.
        text_loss: on held-out plain text, in nats a token; None where it is not, or the comparison has no such text.
    """

    scale: float
    score: float | None
    text_loss: float | None


@dataclass(frozen=True)
class Outcome:
    """What came of a trial.

    Args:
        trial: which.
        failure: why there is no trained model: the loss was no longer a finite number; None: there is one.
        r: shard size or rank, after the parameters were matched; None for full fine-tuning.
        trainable_parameters: of the method.
        init_seconds: putting the adapter in, its initialization included.
        train_seconds: of all steps.
        step_seconds: the median step's.
        peak_memory_bytes: the most that the training process held.
        saved_bytes: of the trained weights' files.
        validation: the score by which learning rates are chosen, of runs made for that.
        validation_higher_is_better: whether a larger one is a better one.
        results: of the test tasks, by name; empty for runs that were made to choose a rate only.
        base_text_loss, text_loss: of the base model and the trained one on held-out plain text, in nats a token.
        scaled: the learning-forgetting curve.
        environment: versions and hardware; `commit`.
        identity: a fingerprint of the settings that it depends on.
    """

    trial: Trial
    failure: str | None = None
    r: int | None = None
    trainable_parameters: int = 0
    init_seconds: float = 0.0
    train_seconds: float = 0.0
    step_seconds: float = 0.0
    peak_memory_bytes: int = 0
    saved_bytes: int = 0
    validation: float | None = None
    validation_higher_is_better: bool = False
    results: dict[str, TaskResult] = field(default_factory=dict)
    base_text_loss: float | None = None
    text_loss: float | None = None
    scaled: tuple[Scaled, ...] = ()
    environment: dict[str, Any] = field(default_factory=dict)
    identity: str = ""

    @property
    def forgetting(self) -> float | None:
        """Rise of the loss on plain text over the base model's, in nats a token."""
        return None if self.text_loss is None or self.base_text_loss is None else self.text_loss - self.base_text_loss

    def write(self, folder: Path) -> None:
        """Leave it in a trial's folder, `outcome.json` last."""
        for task, result in self.results.items():
            write_json_lines(items_file(folder, task), result.records)
        content = asdict(self) | {"results": {task: result.summary() for task, result in self.results.items()}}
        write_json(folder / OUTCOME_FILE, content)


def items_file(folder: Path, task: str) -> Path:
    """Where a trial's folder keeps the records of a task's items."""
    path = folder / ITEMS_FOLDER / f"{file_name(task)}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def read_outcome(folder: Path) -> Outcome | None:
    """What `Outcome.write` left in a trial's folder; None if the trial is not done.

    Raises `InputError` if a file there does not hold what it should.
    """
    file = folder / OUTCOME_FILE
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        results = {task: read_result(summary, items_file(folder, task)) for task, summary in content.pop("results").items()}
        trial, scaled = Trial(**content.pop("trial")), tuple(Scaled(**one) for one in content.pop("scaled"))
        return Outcome(trial=trial, scaled=scaled, results=results, **content)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise InputError(
            f"{file} is no record of a run ({type(error).__name__}: {error}): delete its folder, and the run is made again."
        ) from error


def read_curve(folder: Path) -> list[dict[str, Any]]:
    """The training steps' lines of a trial's metrics.jsonl: step, tokens, seconds, loss, grad_norm and more, by name."""
    return [line for line in read_metrics(folder / METRICS_FILE) if "loss" in line]
