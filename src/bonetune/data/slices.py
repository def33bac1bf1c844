"""Slices of a split, as the hub writes them: train[:5000], train[10%:20%], test[-100:]."""

import re
from dataclasses import dataclass

from bonetune.errors import InputError

_SPLIT = re.compile(r"(?P<name>\w[\w.-]*)(\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


@dataclass(frozen=True)
class Slice:
    """Rows `start` to `stop` of the split `name`; with `percent`, in hundredths of its rows. Negative: from the end."""

    name: str
    start: int | None = None
    stop: int | None = None
    percent: bool = False

    @classmethod
    def parse(cls, split: str) -> "Slice":
        """Read a `dataset_split`. Raises `InputError` if it is none."""
        found = _SPLIT.fullmatch(split)
        ends = (found["start"], found["stop"]) if found else ()
        units = {end.endswith("%") for end in ends if end}
        if found is None or len(units) > 1:
            raise InputError(f"dataset_split {split!r} is no split: write train, train[:5000], train[10%:20%] or train[-100:].")
        start, stop = (int(end.rstrip("%")) if end else None for end in ends)
        return cls(found["name"], start, stop, units == {True})

    @property
    def needs_count(self) -> bool:
        """Whether only who knows the number of rows knows which are meant."""
        return self.percent or (self.start or 0) < 0 or (self.stop or 0) < 0

    def bounds(self, count: int) -> tuple[int, int]:
        """First row and the row after the last, of `count` rows. Hundredths are rounded to the nearest row, as on the hub."""
        ends = [None if end is None else round(end * count / 100) if self.percent else end for end in (self.start, self.stop)]
        start, stop, _ = slice(*ends).indices(count)
        return start, stop
