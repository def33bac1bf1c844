"""Training curves of several seeds as one: their mean and their range against steps, tokens or seconds."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
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
        broken: the running mean of each run that diverged, as (place, value).
    """

    places: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]
    window: int
    broken: list[list[tuple[float, float]]]


def band(curves: Mapping[int, Curve], name: str, clock: Clock, diverged: Collection[int] = ()) -> Band | None:
    """The band of a number that training logs.

    A seed's curve is joined by lines on its own clock and read at common places, as far as every seed has got.

    Args:
        curves: the logged lines of each seed, by ascending step; a step whose loss is not finite is not logged.
        name: of the number, such as `loss`.
        clock: what it is drawn against; lines without it are left out.
        diverged: seeds whose curves stand beside the band, for their runs came to no finite end.

    Returns:
        None if no curve has a value.
    """
    told = {
        seed: [(float(line[clock]), float(line[name])) for line in c if all(is_number(line.get(n)) for n in (clock, name))]
        for seed, c in curves.items()
    }
    told = {seed: points for seed, points in told.items() if points}
    if not told:
        return None
    window = mean_window(max(map(len, told.values())))
    smooth = {seed: running_mean(points, window) for seed, points in told.items()}
    whole = [points for seed, points in smooth.items() if seed not in diverged]
    broken = [points for seed, points in smooth.items() if seed in diverged]
    places = _places(whole)
    values = np.array([np.interp(places, [x for x, _ in points], [y for _, y in points]) for points in whole if len(places)])
    if not len(values):
        return Band([], [], [], [], window, broken)
    mean, low, high = (of(values, axis=0).tolist() for of in (np.mean, np.min, np.max))
    return Band(places, mean, low, high, window, broken)


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
