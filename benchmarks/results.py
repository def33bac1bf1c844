"""What a part of the benchmark hands back, and how tables are written."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Result:
    """Args: rows: for JSON. text: the same as Markdown tables with a line about each."""

    rows: list[dict[str, Any]]
    text: str


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table with aligned columns, the first to the left, the others to the right."""
    widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]

    def row(cells: Sequence[str]) -> str:
        first, *others = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join((first, *others))} |"

    rule = row(["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])])
    return "\n".join([row(header), rule, *map(row, lines)])
