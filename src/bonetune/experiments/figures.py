"""Figures of the report: where bands, lines, dots and ticks stand, in thousandths of a figure's width and height."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from bonetune.training.charts import SIDE, Tick

Point = tuple[float, float]
Look = Literal["band", "line", "pale", "dots", "seeds", "chosen", "guide"]

# Positive values that span more than this factor stand on a logarithmic axis.
_WIDE = 12.0


@dataclass(frozen=True)
class Axis:
    """An axis: what it shows, from where to where, and its ticks."""

    title: str
    low: float
    high: float
    logarithmic: bool
    ticks: tuple[Tick, ...]

    def place(self, value: float) -> float:
        """From its beginning, in thousandths."""
        low, high, value = (math.log(n) if self.logarithmic else n for n in (self.low, self.high, value))
        return SIDE * (value - low) / (high - low)


@dataclass(frozen=True)
class Mark:
    """Part of a drawing: SVG path data in a method's colour."""

    look: Look
    colour: int
    path: str


@dataclass(frozen=True)
class Note:
    """A short text at a place, from the left and from the bottom."""

    colour: int
    left: float
    bottom: float
    text: str


@dataclass(frozen=True)
class Label(Note):
    """A name right of a figure, and where the line that it belongs to ends: at `left`, and `end` from the bottom."""

    end: float


@dataclass(frozen=True)
class Hint:
    """What is shown over a part of a figure."""

    left: float
    top: float
    width: float
    height: float
    text: str


@dataclass(frozen=True)
class Figure:
    """A figure, ready to be drawn.

    Args:
        title: what is shown, with its unit.
        x, y: its axes.
        marks: in the order in which they are drawn.
        crosses: where runs diverged.
        labels: names beside the ends of the lines.
        hints: what is shown where a pointer rests.
        caption: what the marks mean.
        wide: whether it takes the page's width.
    """

    title: str
    x: Axis
    y: Axis
    marks: tuple[Mark, ...]
    crosses: tuple[Note, ...] = ()
    labels: tuple[Label, ...] = ()
    hints: tuple[Hint, ...] = ()
    caption: str = ""
    wide: bool = field(default=False, kw_only=True)


def axis(
    title: str,
    values: Sequence[float],
    *,
    logarithmic: bool | None = None,
    margin: float = 0.0,
    text: Callable[[float], str] | None = None,
) -> Axis:
    """An axis that shows all of `values`.

    Args:
        title: what it shows.
        values: finite ones, at least one.
        logarithmic: None: where positive values span more than a decade.
        margin: room beyond the least and the greatest, as a part of the span.
        text: a tick's number.
    """
    low, high = min(values), max(values)
    if logarithmic is None:
        logarithmic = low > 0 and high / low > _WIDE
    text = text or number
    if logarithmic:
        low, high = (low / 1.6, high * 1.6) if low == high else (low, high)
        beyond = (high / low) ** margin
        low, high = low / beyond, high * beyond
        ticks = _logarithmic(low, high)
    else:
        room = (high - low or abs(high) or 1.0) * (margin if high > low else 0.5)
        low, high = low - room, high + room
        ticks = _linear(low, high)
    bare = Axis(title, low, high, logarithmic, ())
    return Axis(title, low, high, logarithmic, tuple(Tick(bare.place(tick), text(tick)) for tick in ticks))


def _linear(low: float, high: float) -> list[float]:
    """About five multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * digit for digit in (1, 2, 5, 10) if power * digit >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{count * step:.12g}") for count in range(first, last + 1)]


def _logarithmic(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, or powers alone where those would be many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        ticks = [float(f"{digit}e{power}") for power in decades for digit in digits]
        ticks = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(ticks) <= 7:
            break
    return ticks[:: -(-len(ticks) // 7)] if ticks else [low, high]


def number(value: float) -> str:
    """A tick's number."""
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):.4g}{letter}"
    return f"{value:.4g}"


def stroke(points: Sequence[Point], x: Axis, y: Axis) -> str:
    """A line through points."""
    placed = [(x.place(a), SIDE - y.place(b)) for a, b in points]
    return "".join(f"{'L' if number else 'M'}{a:.1f} {b:.1f}" for number, (a, b) in enumerate(placed))


def dots(points: Sequence[Point], x: Axis, y: Axis) -> str:
    """Strokes without length, which are dots where line ends are round."""
    return "".join(f"M{x.place(a):.1f} {SIDE - y.place(b):.1f}h0" for a, b in points)


def area(places: Sequence[float], low: Sequence[float], high: Sequence[float], x: Axis, y: Axis) -> str:
    """What lies between two curves."""
    there, back = list(zip(places, high, strict=True)), list(zip(places, low, strict=True))[::-1]
    return f"{stroke(there + back, x, y)}Z" if there else ""


def spread(places: Sequence[float], gap: float) -> list[float]:
    """The ascending places nearest to the given ascending ones, in least squares, that lie at least `gap` apart."""
    # less their gaps, places need only ascend: isotonic regression by its min-max formula
    free = [place - gap * number for number, place in enumerate(places)]
    ends = range(1, len(free) + 1)
    return [gap * i + max(min(sum(free[j:k]) / (k - j) for k in ends if k > i) for j in range(i + 1)) for i in range(len(free))]
