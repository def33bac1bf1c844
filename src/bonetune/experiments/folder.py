"""The folder of a comparison: whom it belongs to, and what it was made of."""

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bonetune.errors import InputError, RunError
from bonetune.experiments.outcome import OUTCOME_FILE, read_outcome
from bonetune.experiments.page import REPORT_FILE
from bonetune.experiments.settings import Comparison, Method, load_comparison
from bonetune.experiments.tables import TABLE_FILES
from bonetune.experiments.trial import RUNS
from bonetune.files import usable_folder, write_json, write_text

SETTINGS_FILE, DATA_FILE = "comparison.yaml", "data.json"
# What may differ when a comparison goes on: what it is called and compared with, which methods and seeds there are besides.
_MAY_CHANGE = {
    "title",
    "description",
    "methods",
    "against",
    "seeds",
    "keep_weights",
    "engine",
    "parallel",
    "resources",
}


# And these besides, until a run that counts is done: nothing depends on them yet. Nor may rates be chosen anew after that,
# by those who have seen the tests.
_UNTIL_COUNTED = {"tests", "text", "scales", "most_rates"}


@contextlib.contextmanager
def claimed(comparison: Comparison, data: Mapping[str, str | None], *, resume: bool, overwrite: bool) -> Iterator[None]:
    """The comparison's folder, this process's alone while it is open.

    Args:
        comparison: the settings.
        data: fingerprints of model and rows, as `plan_comparison` takes them.
        resume, overwrite: what to do with a comparison that is there.

    Raises:
        InputError: it holds another comparison, or one and the user has not said what to do with it; or rows have changed.
        RunError: another process is at it.
    """
    import fcntl

    check_folder(comparison, resume=resume, overwrite=overwrite)
    folder = Path(comparison.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(f"Another process is making the runs in {folder}: wait for it, or end it.") from error
        if overwrite:
            shutil.rmtree(folder / RUNS, ignore_errors=True)
            for name in (REPORT_FILE, *TABLE_FILES):  # of the comparison that was
                (folder / name).unlink(missing_ok=True)
        elif (folder / DATA_FILE).is_file():
            _check_data(folder, data, counted=_has_counted(folder, comparison.sweep_seed))
        write_json(folder / DATA_FILE, data)
        write_text(folder / SETTINGS_FILE, comparison.to_yaml())
        yield


def check_folder(comparison: Comparison, *, resume: bool, overwrite: bool) -> None:
    """Raise `InputError` unless the folder may be this comparison's; nothing is written."""
    folder = Path(comparison.output_dir)
    usable_folder(folder, "output_dir")
    if resume and overwrite:
        raise InputError("--resume goes on with the comparison in output_dir, --overwrite throws it away: pass one of them.")
    file = folder / SETTINGS_FILE
    if file.is_file() and not (resume or overwrite):
        raise InputError(f"output_dir {folder} already holds a comparison: pass --resume or --overwrite, or choose another.")
    if file.is_file() and resume:
        _check_same(load_comparison(file), comparison, file)


def _has_counted(folder: Path, sweep_seed: int) -> bool:
    """Whether a run that counts is done."""
    found = (read_outcome(file.parent) for file in (folder / RUNS).glob(f"*/{OUTCOME_FILE}"))
    return any(outcome is not None and outcome.trial.seed != sweep_seed for outcome in found)


def _check_data(folder: Path, data: Mapping[str, str | None], *, counted: bool) -> None:
    file = folder / DATA_FILE
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} cannot be read ({error}): delete it if the data are what they were.") from error
    always = ("model", "train", "validation")
    changed = [name for name in data if name in before and before[name] != data[name] and (counted or name in always)]
    if changed:
        raise InputError(
            f"What the runs in {folder} were made of has changed: {', '.join(changed)}. Put the old files back, or choose "
            "another output_dir."
        )


def _check_same(before: Comparison, now: Comparison, file: Path) -> None:
    counted = _has_counted(file.parent, before.sweep_seed)
    free = _MAY_CHANGE | (set() if counted else _UNTIL_COUNTED)
    changed = [
        f"{name} ({value!r:.80}, now {getattr(now, name)!r:.80})"
        for name in Comparison.model_fields
        if name not in free and (value := getattr(before, name)) != getattr(now, name)
    ]
    for name, method in now.methods.items():
        earlier = before.methods.get(name)
        if earlier is not None and (earlier != method if counted else earlier.settings != method.settings):
            changed.append(f"methods.{name} ({_said(earlier)!r:.80}, now {_said(method)!r:.80})")
    if changed:
        raise InputError(
            f"The comparison in {file.parent} was started with other settings: {'; '.join(changed)}. Choose another "
            "output_dir, or pass --overwrite."
        )


def _said(method: Method) -> dict[str, Any]:
    return method.model_dump(exclude_none=True)
