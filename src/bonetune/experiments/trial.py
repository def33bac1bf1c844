"""One run of a comparison, from its settings to its outcome: train, load what was saved, examine it."""

import math
import os
import shutil
import statistics
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from bonetune.diagnostics import environment, git_state
from bonetune.errors import DivergedError, InputError
from bonetune.evaluation import TaskResult, evaluate
from bonetune.evaluation.evaluate import task_named
from bonetune.evaluation.task import CHOICES, digest
from bonetune.experiments.outcome import Outcome, Scaled, Trial, finite, read_curve, read_outcome
from bonetune.experiments.scaling import Update
from bonetune.experiments.settings import Comparison, Examination
from bonetune.files import read_config
from bonetune.models import Loaded, load_model
from bonetune.training import train
from bonetune.training.baselines import INITIAL_FOLDER
from bonetune.training.checkpoints import checkpoints
from bonetune.training.config import RunConfig
from bonetune.training.folder import SUMMARY_FILE, finished, trained_files

RUNS = "runs"


def folder_of(comparison: Comparison, trial: Trial) -> Path:
    """Where a trial's run lies."""
    return Path(comparison.output_dir) / RUNS / trial.name


def identity_of(comparison: Comparison, trial: Trial, r: int | None, *, counts: bool) -> str:
    """A fingerprint of all that a trial's outcome depends on.

    Args:
        comparison: the settings.
        trial: which.
        r: shard size or rank.
        counts: whether it is examined by the tests, and not only to choose a learning rate.
    """
    config = comparison.run(trial.method, r, trial.learning_rate, trial.seed, Path())
    # what is left at its default is left out, so that a setting which a later version has besides changes nothing
    run = config.model_dump(mode="json", exclude_defaults=True)
    examinations = [*comparison.tests, *([comparison.text] if comparison.text else [])] if counts else [comparison.validation]
    examined = [examination.model_dump(mode="json", exclude_defaults=True) for examination in examinations]
    return digest({"run": run, "examined": examined, "scales": comparison.scales if counts else ()})


def known_outcome(comparison: Comparison, trial: Trial, r: int | None, *, counts: bool) -> Outcome | None:
    """The outcome of a trial, if it is done. Raises `InputError` if it was made with other settings."""
    folder = folder_of(comparison, trial)
    outcome = read_outcome(folder)
    if outcome is not None and outcome.identity != identity_of(comparison, trial, r, counts=counts):
        raise InputError(f"The run in {folder} was made with other settings: delete its folder, and it is made anew.")
    if outcome is not None and not comparison.keep_weights:
        _discard_weights(folder)  # it may have been killed before it could
    return outcome


@contextmanager
def _output_to(file: Path) -> Iterator[None]:
    """What this process writes to its standard output and error goes into a file while it is open."""
    file.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with file.open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, before in zip((1, 2), kept, strict=True):
            os.dup2(before, number)
            os.close(before)


def perform(comparison: Comparison, trial: Trial, r: int | None, *, counts: bool) -> Outcome:
    """`run_trial`, with what libraries say of it in a file beside its folder."""
    folder = folder_of(comparison, trial)
    with _output_to(folder.with_name(f"{folder.name}.log")):
        return run_trial(comparison, trial, r, counts=counts)


def run_trial(comparison: Comparison, trial: Trial, r: int | None, *, counts: bool) -> Outcome:
    """Make a run and examine it; its outcome is written last. A run that was killed goes on from its last checkpoint.

    Raises `InputError` or `RunError`, as `train` and `evaluate` do; a loss that is no longer finite is an outcome.
    """
    folder = folder_of(comparison, trial)
    config = comparison.run(trial.method, r, trial.learning_rate, trial.seed, folder)
    identity = identity_of(comparison, trial, r, counts=counts)
    commit = (git_state(Path(__file__).parent) or {}).get("commit")
    facts = {"identity": identity, "environment": environment() | {"commit": commit}}
    try:
        _trained(config, folder, identity)
    except DivergedError as error:
        outcome = Outcome(trial, failure=str(error).partition(":")[0], r=r, **facts)
        outcome.write(folder)
        _discard_weights(folder)
        return outcome
    # all weights, where they were trained, are stored as they were trained; of a base the file's dtype says nothing
    dtype = "auto" if config.baseline == "full" else config.dtype
    loaded = load_model(str(folder), dtype, trust_remote_code=config.trust_remote_code)
    outcome = Outcome(
        trial,
        r=r,
        **facts,
        **_measured(folder),
        **_examined(comparison, config, loaded, counts=counts),
    )
    outcome.write(folder)
    if not comparison.keep_weights:
        _discard_weights(folder)
    return outcome


def _trained(config: RunConfig, folder: Path, identity: str) -> None:
    """Train, or go on, or leave what is there, if it was made with these settings."""
    mark = folder / "identity"
    same = mark.is_file() and mark.read_text(encoding="utf-8") == identity
    if same and finished(folder):
        return
    if not same:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(identity, encoding="utf-8")
    resume = bool(checkpoints(folder))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "learning_rate=.* is of LoRA's size", UserWarning)  # a sweep tries it
        train(config, resume=resume, overwrite=not resume)


def _measured(folder: Path) -> dict[str, Any]:
    """What a run's files tell of its costs."""
    summary, curve = read_config(folder / SUMMARY_FILE), read_curve(folder)
    ends = [(line["step"], line["seconds"]) for line in curve]
    steps = [(later[1] - before[1]) / (later[0] - before[0]) for before, later in zip([(0, 0.0), *ends], ends, strict=False)]
    return {
        "trainable_parameters": summary["trainable_parameters"],
        "init_seconds": summary["init_seconds"],
        "train_seconds": summary["seconds"],
        "step_seconds": statistics.median(steps),
        "peak_memory_bytes": max(line["memory_bytes"] for line in curve),
        "saved_bytes": sum(file.stat().st_size for file in trained_files(folder)),
    }


def _examined(comparison: Comparison, config: RunConfig, loaded: Loaded, *, counts: bool) -> dict[str, Any]:
    if not counts:
        validation = _scores(comparison.validation, loaded)[0]
        if not math.isfinite(validation.score):
            return {"failure": f"The validation score is {validation.score}"}
        return {"validation": validation.score, "validation_higher_is_better": validation.higher_is_better}
    found: dict[str, Any] = {"results": {}}
    for test in comparison.tests:
        for result in _scores(test, loaded):
            name = test.called(result.task)
            found["results"][name] = replace(result, task=name)
    if broken := [name for name, result in found["results"].items() if not math.isfinite(result.score)]:
        return {"failure": f"The score of {broken[0]} is not finite"}
    if comparison.text is not None:
        text = _scores(comparison.text, loaded, config.model_name_or_path if config.baseline == "full" else None)[0]
        found |= {"base_text_loss": text.metrics["base_loss"], "text_loss": text.metrics["loss"]}
        if not math.isfinite(text.metrics["loss"]):
            return {"failure": "The loss on plain text is not finite"}
    if comparison.scales:
        found["scaled"] = _curve(comparison, config, loaded)
    return found


def _curve(comparison: Comparison, config: RunConfig, loaded: Loaded) -> tuple[Scaled, ...]:
    """The first test, and the loss on plain text, with the update times each of the factors."""
    update = Update.between(loaded, config.model_name_or_path) if config.baseline == "full" else Update.of(loaded)
    first, text = _first_task(comparison.tests[0]), comparison.text
    points = []
    for scale in comparison.scales:
        with update.scaled(scale) as model:
            score = _scores(first, model)[0].score
            perplexed = _scores(text.model_copy(update={"tasks": ("perplexity",)}), model)[0] if text is not None else None
            text_loss = perplexed.metrics["loss"] if perplexed is not None else None
            points.append(Scaled(scale, finite(score), finite(text_loss)))
    return tuple(points)


def _first_task(examination: Examination) -> Examination:
    """An examination by its first task alone, without the options that only the others heed."""
    task = task_named(examination.tasks[0])
    unheeded = [name for name in CHOICES if name in Examination.model_fields and name not in task.heeds]
    return examination.model_copy(update={"tasks": (task.name,)} | dict.fromkeys(unheeded))


def _scores(examination: Examination, loaded: Loaded, base: str | None = None) -> list[TaskResult]:
    return evaluate(loaded, examination.tasks, base=base, **examination.arguments())


def _discard_weights(folder: Path) -> None:
    for file in trained_files(folder):
        file.unlink(missing_ok=True)
    for place in (*checkpoints(folder), folder / INITIAL_FOLDER):
        shutil.rmtree(place, ignore_errors=True)
