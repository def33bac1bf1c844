"""Curves as the report's page draws them: where lines, ticks and hints stand, in thousandths of a chart's width and height."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from bonetune.training.plots import Points

SIDE = 1000.0
# More points than a wide screen has room for are thinned to the least and the greatest of each stretch.
_STRETCHES = 400
_MOST_HINTS = 200
# From this ratio of the greatest value to the median on, all but the greatest lie on the floor of a linear axis.
_DECADES = 100
# Below these, values are nought, or each other, as far as the axis is concerned: its ticks would run out of digits.
_NOUGHT = 1e-300
_ALIKE = 1e-9

Look = Literal["raw", "mean", "dots"]


@dataclass(frozen=True)
class Line:
    """A curve.

    Args:
        name: as the legend shows it.
        look: `raw` (thin and pale), `mean` (strong), or `dots` (joined by a line).
        points: (step, value); a value that is not finite is a gap.
        derived: whether it is computed from another curve of the chart.
    """

    name: str
    look: Look
    points: Points
    derived: bool = False


@dataclass(frozen=True)
class Tick:
    """A place on an axis, from its beginning, and the number that stands there."""

    place: float
    text: str


@dataclass(frozen=True)
class Hint:
    """What is shown over a stretch of the steps."""

    left: float
    width: float
    text: str


@dataclass(frozen=True)
class Drawn:
    """A line as SVG path data: the stroke, and the dots at values that stand alone or are to be seen."""

    name: str
    look: Look
    stroke: str
    dots: str


@dataclass(frozen=True)
class Chart:
    """A chart, ready to be drawn. `missing` is the number of values that are not finite."""

    title: str
    lines: tuple[Drawn, ...]
    steps: tuple[Tick, ...]
    values: tuple[Tick, ...]
    hints: tuple[Hint, ...]
    missing: int
    logarithmic: bool


def chart(title: str, lines: Iterable[Line], span: tuple[float, float], *, from_zero: bool = False) -> Chart | None:
    """Lay out a chart of lines over optimizer steps; None if no line has a finite value.

    Args:
        title: what is shown, with its unit.
        lines: the curves.
        span: first and last step of the axis.
        from_zero: let the axis begin at zero, as amounts want it. Else it does where zero is near, and is logarithmic where
            positive values span decades.
    """
    lines = [line for line in lines if line.points]
    missing = sum(not math.isfinite(value) for line in lines if not line.derived for _, value in line.points)
    lines = [replace(line, points=_thinned(line.points)) for line in lines]
    values = sorted(value for line in lines for _, value in line.points if math.isfinite(value))
    if not values:
        return None
    logarithmic = not from_zero and values[0] > _NOUGHT and values[-1] > _DECADES * values[len(values) // 2]
    ticks = _decades(values[0], values[-1]) if logarithmic else _round_numbers(*_range(values[0], values[-1], from_zero))
    first, last = span if span[0] < span[1] else (span[0] - 1, span[1] + 1)

    def across(step: float) -> float:
        return SIDE * (step - first) / (last - first)

    def up(value: float) -> float:
        if not math.isfinite(value):
            return math.nan
        low, high, value = (math.log(n) if logarithmic else n for n in (ticks[0], ticks[-1], value))
        return SIDE * (value - low) / (high - low)

    def drawn(line: Line) -> Drawn:
        placed = [(across(step), SIDE - up(value)) for step, value in line.points]
        return Drawn(line.name, line.look, _stroke(placed), _dots(placed, every=line.look == "dots"))

    whole = [step for step in _round_numbers(first, last) if first <= step <= last and step == int(step)]
    return Chart(
        title=title,
        lines=tuple(map(drawn, lines)),
        steps=tuple(Tick(across(step), f"{step:,.0f}") for step in whole),
        values=tuple(Tick(up(value), _number(value)) for value in ticks),
        hints=_hints(lines, across),
        missing=missing,
        logarithmic=logarithmic,
    )


def _thinned(points: Points) -> Points:
    if len(points) <= 2 * _STRETCHES:
        return points
    kept: Points = []
    for stretch in range(_STRETCHES):
        part = points[stretch * len(points) // _STRETCHES : (stretch + 1) * len(points) // _STRETCHES]
        finite = [point for point in part if math.isfinite(point[1])]
        ends = {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])} if finite else {part[0]}
        kept += sorted(ends)
    return kept


def _range(low: float, high: float, from_zero: bool) -> tuple[float, float]:
    largest = max(abs(low), abs(high))
    if largest <= _NOUGHT:
        return 0.0, 1.0
    alike = high - low <= _ALIKE * largest
    if low >= 0 and (from_zero or low <= high / 2 or alike):
        return 0.0, high
    return (low, 0.0) if alike else (low, high)


def _round_numbers(low: float, high: float, wanted: int = 5) -> list[float]:
    """About `wanted` multiples of 1, 2 or 5 times a power of ten, the first at or below `low`, the last at or above `high`."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * digit for digit in (1, 2, 5, 10) if power * digit >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def _decades(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, (last - first) // 5)
    return [10.0**power for power in range(first, last + every, every)]


def _stroke(placed: Points) -> str:
    path, joined = [], False
    for x, y in placed:
        if math.isfinite(y):
            path.append(f"{'L' if joined else 'M'}{x:.1f} {y:.1f}")
        joined = math.isfinite(y)
    return "".join(path)


def _dots(placed: Points, *, every: bool) -> str:
    # a stroke without length is a dot where line ends are round
    seen = [math.isfinite(y) for _, y in placed]
    alone = [not before and not after for before, after in zip([False, *seen[:-1]], [*seen[1:], False], strict=True)]
    shown = [point for point, here, single in zip(placed, seen, alone, strict=True) if here and (every or single)]
    return "".join(f"M{x:.1f} {y:.1f}h0" for x, y in shown)


def _hints(lines: list[Line], across: Callable[[float], float]) -> tuple[Hint, ...]:
    said: dict[float, list[str]] = {}
    for line in lines:
        for step, value in line.points:
            said.setdefault(step, []).append(f"{line.name} {_number(value)}")
    steps = sorted(said)
    steps = steps[:: -(-len(steps) // _MOST_HINTS)]
    borders = [0.0, *((across(a) + across(b)) / 2 for a, b in pairwise(steps)), SIDE]
    return tuple(
        Hint(left, right - left, "\n".join([f"step {step:,.0f}", *said[step]]))
        for (left, right), step in zip(pairwise(borders), steps, strict=True)
    )


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "not finite"
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e7 else f"{value:.4g}"
