"""The records of a task's items as they are made, kept so that an evaluation that was killed goes on where it was."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bonetune.errors import InputError
from bonetune.evaluation.result import Record, TaskResult
from bonetune.files import json_text, read_config, read_json_lines, write_json, write_json_lines


def file_name(task: str) -> str:
    """A task's name as a file may bear it."""
    return task.replace(":", "-").replace("/", "-")


class Ledger:
    """A task's records, each under the number of its row, which counts from 1.

    A record that is there already, as after a kill within a batch, is neither kept nor counted again.

    Args:
        total: how many items there are.
        on_items: called with the items done and `total`.
        file: where records are added as they come; None keeps them in memory alone.

    Attributes:
        records: those there are.
    """

    def __init__(self, total: int, on_items: Callable[[int, int], None] | None = None, file: Path | None = None) -> None:
        self.total, self.file, self._on_items = total, file, on_items
        known = read_json_lines(file) if file is not None and file.is_file() else []
        known = [json.loads(line) for line in dict.fromkeys(map(json.dumps, known))]
        self.records: dict[int, Record] = {record["row"]: record for record in known}
        self._done = 0
        if file is not None:
            write_json_lines(file, known)  # without a line that was torn
        if known:
            self.count(len(known))

    def add(self, records: list[Record]) -> None:
        """Keep the records of items that are done together."""
        records = [record for record in records if self.records.get(record["row"]) != record]
        self.records |= {record["row"]: record for record in records}
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as file:
                file.write("".join(json_text(record) + "\n" for record in records))
        self.count(len(records))

    def count(self, items: int) -> None:
        """Tell of items that are done, with a record or without."""
        self._done += items
        if self._on_items is not None:
            self._on_items(self._done, self.total)

    @property
    def ordered(self) -> list[Record]:
        """The records in the order of their rows."""
        return [self.records[row] for row in sorted(self.records)]


class Shelf:
    """A task's place in an output folder: TASK.jsonl, its records, and TASK.json, what they are records of and the score.

    Args:
        folder: the output folder.
        task: the task's name.
        identity: what the records depend on.
    """

    def __init__(self, folder: Path, task: str, identity: dict[str, Any]) -> None:
        self.task, self.identity = task, json.loads(json.dumps(identity))
        self.records, self._about = folder / f"{file_name(task)}.jsonl", folder / f"{file_name(task)}.json"

    def claim(self, *, resume: bool, overwrite: bool, stranger: str | None = None) -> None:
        """Make the place this evaluation's.

        Args:
            resume, overwrite: what the user has said to do with records that are there.
            stranger: what is examined, if nothing tells whether it is what the records are of.

        Raises `InputError` if it holds another's records, or this one's and the user has not said what to do with them.
        """
        if overwrite or not (self._about.is_file() or self.records.is_file()):
            self.records.unlink(missing_ok=True)
            self._about.unlink(missing_ok=True)
            return
        if not resume:
            raise InputError(f"{self.records} holds records already: pass --resume or --overwrite, or choose another folder.")
        if stranger is not None:
            raise InputError(
                f"{self.records} cannot be gone on with: {stranger} has no fingerprint (no file of weights that is known), so "
                "nothing tells whether it is the model that the records are of. Pass --overwrite to replace them."
            )
        before = read_config(self._about)["identity"] if self._about.is_file() else {}
        changed = [
            f"{name} ({before.get(name)!r}, now {self.identity.get(name)!r})"
            for name in self.identity | before
            if before.get(name) != self.identity.get(name)
        ]
        if changed:
            raise InputError(
                f"{self.records} was made with other settings ({'; '.join(changed)}): pass --overwrite to replace it."
            )

    @property
    def result(self) -> TaskResult | None:
        """The task's result, if it is done."""
        if not self._about.is_file():
            return None
        summary = read_config(self._about).get("summary")
        return None if summary is None else read_result(summary, self.records)

    def open(self) -> None:
        """Say what the records to come are records of."""
        self.records.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._about, {"identity": self.identity})

    def close(self, result: TaskResult) -> None:
        """Leave the result."""
        write_json_lines(self.records, result.records)
        write_json(self._about, {"identity": self.identity, "summary": result.summary()})


def read_result(summary: Record, records: Path) -> TaskResult:
    """A result from its summary and the file of its records; a number that JSON could not hold is NaN."""
    interval = summary.get("interval")
    told: dict[str, Any] = summary | {
        "score": _number(summary["score"]),
        "interval": tuple(map(_number, interval)) if interval is not None else None,
    }
    if "metrics" in summary:
        told["metrics"] = {name: _number(value) for name, value in summary["metrics"].items()}
    return TaskResult(**told, records=read_json_lines(records))


def _number(value: float | None) -> float:
    return math.nan if value is None else value
