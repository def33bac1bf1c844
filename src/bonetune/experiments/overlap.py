"""Rows that a comparison trains on and is examined on: a score on them says how well they are remembered."""

import json
from pathlib import Path
from typing import Any

from bonetune.data import read_rows
from bonetune.evaluation.task import digest
from bonetune.experiments.settings import Comparison, Examination
from bonetune.training.config import RunConfig


def shared_rows(comparison: Comparison, config: RunConfig) -> list[str]:
    """A sentence for each test, and the validation, that has rows of the training data or, as a test, of the validation.

    Rows are the same if all their fields are. Those that a protocol has of its own are not looked at, nor are streams, nor data
    sets of the hub whose split the protocol chooses.

    Args:
        comparison: the examinations.
        config: of a run that trains on what most do.
    """
    examined = {"the validation": _rows(comparison.validation)}
    examined |= {f"the test {test.called(test.tasks[0])}": _rows(test) for test in comparison.tests}
    examined = {name: rows for name, rows in examined.items() if rows}
    known = {"the training data": set(_trained_on(config))} if examined and not config.streaming else {}
    told = []
    for name, rows in examined.items():
        for other, theirs in known.items():
            if count := sum(row in theirs for row in rows):
                told.append(f"{count} of the {len(rows)} rows of {name} are rows of {other}, too.")
        if name == "the validation":
            known[name] = set(rows)
    return told


def _rows(examination: Examination) -> list[str]:
    data, split = examination.data, examination.split
    if data is None or (split is None and not Path(data).exists()):
        return []
    return [_key(row) for row in read_rows(data, split or "test")[: examination.limit]]


def _trained_on(config: RunConfig) -> list[str]:
    return [_key(row) for name in config.dataset_names for row in read_rows(name, config.dataset_split)]


def _key(row: dict[str, Any]) -> str:
    return digest(json.dumps(row, sort_keys=True, default=str))  # a parquet file may hold dates
