"""Training curves of several seeds as one: their mean and their range against steps, tokens or seconds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

import numpy as np

from bonetune.training.plots import is_number, mean_window, running_mean

# More places than a wide screen can show are thinned out.
_PLACES = 240

Clock = Literal["step", "tokens", "seconds"]
Curve = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Band:
    """Curves of seeds at common places.

    Args:
        places: steps, tokens or seconds, ascending.
        mean, low, high: over the seeds at each place, of their running means.
        window: how many values a running mean is taken over.
        broken: of each curve that does not stay finite, its running mean up to there, as (place, value).
    """

    places: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]
    window: int
    broken: list[list[tuple[float, float]]]


def band(curves: Sequence[Curve], name: str, clock: Clock) -> Band | None:
    """The band of a number that training logs.

    A seed's curve is joined by lines on its own clock and read at common places, as far as every seed has got.

    Args:
        curves: the logged lines of each seed, by ascending step.
        name: of the number, such as `loss`.
        clock: what it is drawn against; lines without it are left out.

    Returns:
        None if no curve has a value.
    """
    told = [
        [(line[clock], line[name]) for line in c if is_number(line.get(name)) and is_number(line.get(clock))] for c in curves
    ]
    told = [points for points in told if points]
    if not told:
        return None
    window = mean_window(max(map(len, told)))
    whole, broken = [], []
    for points in told:
        finite = list(takewhile(lambda point: math.isfinite(point[1]), points))
        smooth = running_mean([(float(x), float(y)) for x, y in finite], window) if finite else []
        (whole if len(finite) == len(points) else broken).append(smooth)
    places = _places(whole)
    values = np.array([np.interp(places, [x for x, _ in points], [y for _, y in points]) for points in whole if len(places)])
    if not len(values):
        return Band([], [], [], [], window, [points for points in broken if points])
    mean, low, high = (of(values, axis=0).tolist() for of in (np.mean, np.min, np.max))
    return Band(places, mean, low, high, window, [points for points in broken if points])


def _places(curves: Sequence[Sequence[tuple[float, float]]]) -> list[float]:
    """Those of all curves, from the last one's beginning to the first one's end, thinned."""
    if not curves:
        return []
    first, last = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    places = sorted(
        {x for curve in curves for x, _ in curve if first <= x <= last} | ({first, last} if first <= last else set())
    )
    kept = np.unique(np.linspace(0, len(places) - 1, min(len(places), _PLACES)).round().astype(int)) if places else []
    return [places[number] for number in kept]
