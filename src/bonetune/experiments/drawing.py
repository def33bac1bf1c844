"""What the report draws: curves of the training, learning against forgetting, learning rates, and differences as intervals."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from bonetune.experiments.curves import Band, Clock, Curve, band
from bonetune.experiments.figures import (
    Axis,
    Figure,
    Hint,
    Label,
    Mark,
    Note,
    area,
    axis,
    dots,
    number,
    spread,
    stroke,
)
from bonetune.experiments.findings import FORGETTING, Analysis, Difference, Kept, Test
from bonetune.experiments.wording import NONE, rate_text, score_text, unit
from bonetune.training.charts import SIDE, Tick

_HINTS = 60
# Names beside the ends of lines stand at least so far apart, in thousandths of a wide figure's height.
_GAP = 52.0
# An interval wider than this many times the largest difference of a seed is cut off in the drawing.
_CUT = 3.0
# So many learning rates each have their tick.
_TICKS = 8


@dataclass(frozen=True)
class Row:
    """A difference as a drawing: the interval, its ends as far as they are seen, the seeds and the mean."""

    interval: str
    ends: str
    seeds: str
    mean: float


@dataclass(frozen=True)
class Forest:
    """Differences drawn on one axis: a row each, and where zero is."""

    rows: list[Row]
    zero: float
    ticks: tuple[Tick, ...]
    better_left: bool


def forest(rows: Sequence[Difference], test: Test) -> Forest:
    """The drawing of a table of differences."""
    seeds = [abs(value) for row in rows for value in row.by_seed.values()]
    ends = [abs(end) for row in rows for end in row.interval or ()]
    most = max([*seeds, min(max(ends, default=0.0), _CUT * max(seeds))]) or 1.0
    factor = 100 if test.kind == "share" else 1
    x = axis("", [-most, most], logarithmic=False, margin=0.1, text=lambda value: f"{factor * value:+.4g}" if value else "0")

    def drawn(row: Difference) -> Row:
        interval, caps = "", []
        if row.interval is not None:
            low, high = (min(max(end, x.low), x.high) for end in row.interval)
            interval = f"M{x.place(low):.1f} 50H{x.place(high):.1f}"
            caps = [end for end in row.interval if x.low < end < x.high]
        return Row(
            interval,
            "".join(f"M{x.place(end):.1f} 25v50" for end in caps),
            "".join(f"M{x.place(value):.1f} 50h0" for value in row.by_seed.values()),
            x.place(row.mean),
        )

    shown = [tick for tick in x.ticks if tick in (x.ticks[0], x.ticks[-1]) or tick.text == "0"]
    return Forest([drawn(row) for row in rows], x.place(0.0), tuple(shown), better_left=not test.higher_is_better)


def figures(found: Analysis, curves: Mapping[str, Mapping[int, Curve]]) -> dict[str, list[Figure]]:
    """The report's figures by section; those that there is nothing for are left out."""
    colours = {method.name: number for number, method in enumerate(found.methods)}
    diverged = {method.name: method.failures for method in found.methods}
    drawn: tuple[tuple[str, Clock, str, str, dict[str, Any]], ...] = (
        ("loss", "step", "Training loss", "optimizer step", {"wide": True}),
        ("loss", "step", "The same, the last half of the steps", "optimizer step", {"part": 0.5}),
        ("loss", "tokens", "Against tokens trained on", "tokens", {}),
        ("loss", "seconds", "Against time", "seconds of training", {}),
        ("grad_norm", "step", "Gradient norm", "optimizer step", {}),
        ("grad_norm", "tokens", "Gradient norm against tokens", "tokens", {}),
        ("grad_norm", "seconds", "Gradient norm against time", "seconds of training", {}),
    )
    training = [
        _training(curves, colours, diverged, name, clock, title, along, **how) for name, clock, title, along, how in drawn
    ]
    return {
        "training": [figure for figure in training if figure is not None],
        "learned": [figure for figure in (_learned(found, colours),) if figure is not None],
        "sweep": [figure for figure in (_sweep(found, colours),) if figure is not None],
    }


def _training(
    curves: Mapping[str, Mapping[int, Curve]],
    colours: Mapping[str, int],
    diverged: Mapping[str, Collection[int]],
    name: str,
    clock: Clock,
    title: str,
    along: str,
    *,
    part: float = 0.0,
    wide: bool = False,
) -> Figure | None:
    bands = {m: band(runs, name, clock, diverged.get(m, ())) for m, runs in curves.items() if m in colours}
    shown = {method: _cut(one, part) for method, one in bands.items() if one is not None}
    shown = {method: one for method, one in shown.items() if one.places or (one.broken and not part)}
    values = [v for one in shown.values() for v in (*one.low, *one.high, *(v for run in one.broken for _, v in run))]
    places = [p for one in shown.values() for p in (*one.places, *(p for run in one.broken for p, _ in run))]
    if not values or max(places) <= min(places):
        return None
    x = axis(along, places if part else [0.0, *places], logarithmic=False)
    y = axis(title, values, margin=0.03)
    marks = [
        Mark("band", colours[m], area(one.places, one.low, one.high, x, y)) for m, one in shown.items() if len(one.places) > 1
    ]
    crosses, ends = [], {}
    for method, one in shown.items():
        for run in one.broken:
            marks.append(Mark("pale", colours[method], stroke(run, x, y)))
            crosses.append(Note(colours[method], x.place(run[-1][0]), y.place(run[-1][1]), method))
            ends[method] = run[-1]
        if one.places:
            marks.append(Mark("line", colours[method], stroke(list(zip(one.places, one.mean, strict=True)), x, y)))
            ends[method] = (one.places[-1], one.mean[-1])
    window = max(one.window for one in shown.values())
    caption = "line: mean over seeds; band: their range" + (f"; running mean of {window} values" if window > 1 else "")
    return Figure(
        title,
        x,
        y,
        tuple(mark for mark in marks if mark.path),
        tuple(crosses),
        _labels(ends, colours, x, y) if wide else (),
        _over_time(shown, clock, x),
        caption + ("; cross: a run that diverged, not in the mean" if crosses else ""),
        wide=wide,
    )


def _cut(one: Band, part: float) -> Band:
    """What is left of a band without the first `part` of its axis, and without broken runs."""
    if not part or not one.places:
        return one if not part else replace(one, broken=[])
    start = next(i for i, place in enumerate(one.places) if place >= part * one.places[-1])
    return replace(one, places=one.places[start:], mean=one.mean[start:], low=one.low[start:], high=one.high[start:], broken=[])


def _labels(ends: Mapping[str, tuple[float, float]], colours: Mapping[str, int], x: Axis, y: Axis) -> tuple[Label, ...]:
    """Each method's name beside the end of its line, as near as the names leave room for."""
    placed = sorted((y.place(value), method) for method, (_, value) in ends.items())
    heights = spread([place for place, _ in placed], _GAP)
    shift = min(0.0, SIDE - heights[-1]) or max(0.0, -heights[0]) if heights else 0.0
    heights = [height + shift for height in heights]
    return tuple(
        Label(colours[m], x.place(ends[m][0]), height, m, end) for (end, m), height in zip(placed, heights, strict=True)
    )


def _over_time(shown: Mapping[str, Band], clock: Clock, x: Axis) -> tuple[Hint, ...]:
    """The values of every method at some places."""
    last = max((one.places[-1] for one in shown.values() if one.places), default=None)
    if last is None:
        return ()
    first = min(one.places[0] for one in shown.values() if one.places)
    count = min(_HINTS, max(len(one.places) for one in shown.values()))
    centres = [first + (last - first) * i / max(1, count - 1) for i in range(count)]
    borders = [x.place(x.low), *(x.place((a + b) / 2) for a, b in pairwise(centres)), SIDE]
    hints = []
    for centre, (left, right) in zip(centres, pairwise(borders), strict=True):
        told = [f"{'step' if clock == 'step' else clock} {centre:,.0f}"]
        for method, one in shown.items():
            near = min(range(len(one.places)), key=lambda i: abs(one.places[i] - centre)) if one.places else None
            if near is not None and one.places[0] <= centre <= one.places[-1]:
                told.append(f"{method} {one.mean[near]:.4g} ({one.low[near]:.4g} to {one.high[near]:.4g})")
        hints.append(Hint(left, 0.0, right - left, SIDE, "\n".join(told)))
    return tuple(hints)


def _learned(found: Analysis, colours: Mapping[str, int]) -> Figure | None:
    """The first test's score against forgetting, or against the scale where forgetting is not measured."""
    test = found.tests[0] if found.tests else None
    if test is None or test.name == FORGETTING:
        return None
    against_forgetting = any(kept.forgetting is not None for method in found.methods for kept in method.kept)
    against_forgetting |= any(method.forgetting is not None for method in found.methods)
    lines: dict[str, list[Kept]] = {}
    for method in found.methods:
        kept = [one for one in method.kept if one.forgetting is not None or not against_forgetting]
        score = method.scores.get(test.name)
        if not kept and against_forgetting and score is not None and method.forgetting is not None:
            kept = [Kept(1.0, score, method.forgetting)]
        if kept:
            lines[method.name] = kept
    if not lines:
        return None

    def place(one: Kept, seed: int | None = None) -> tuple[float, float]:
        across = one.forgetting if against_forgetting else None
        if seed is None:
            return (one.scale if across is None else across.mean), one.score.mean
        return (one.scale if across is None else across.by_seed[seed]), one.score.by_seed[seed]

    def seeds(one: Kept) -> list[int]:
        return [s for s in one.score.by_seed if not against_forgetting or (one.forgetting and s in one.forgetting.by_seed)]

    of_seeds = {
        name: {
            seed: [place(one, seed) for one in kept if seed in seeds(one)]
            for seed in dict.fromkeys(s for one in kept for s in seeds(one))
        }
        for name, kept in lines.items()
    }
    points = [point for kept in lines.values() for one in kept for point in (place(one), *(place(one, s) for s in seeds(one)))]
    word = f", {unit(test.kind)}" if unit(test.kind) else ""
    across = "forgetting: rise of the loss on plain text, nats a token" if against_forgetting else "scale of the update"
    x = axis(across, [0.0, *(a for a, _ in points)], logarithmic=False, margin=0.04)
    y = axis(
        f"{test.name}{word}",
        [b for _, b in points],
        margin=0.06,
        logarithmic=False if test.kind == "share" else None,
        text=lambda value: score_text(value, test.kind).removesuffix(".0") if test.kind == "share" else number(value),
    )
    marks, hints = [], []
    for name, runs in of_seeds.items():
        marks += [Mark("pale", colours[name], stroke(run, x, y)) for run in runs.values()]
    for name, kept in lines.items():
        means = [place(one) for one in kept]
        marks.append(Mark("line", colours[name], stroke(means, x, y)))
        marks.append(Mark("seeds", colours[name], dots([p for run in of_seeds[name].values() for p in run], x, y)))
        marks.append(Mark("dots", colours[name], dots(means, x, y)))
        whole = [place(one) for one in kept if one.scale == 1]
        marks.append(Mark("chosen", colours[name], dots(whole, x, y)))
        for one in kept:
            a, b = place(one)
            rise = NONE if one.forgetting is None else score_text(one.forgetting.mean, "rise")
            text = f"{name}, update times {one.scale:g}\n{test.name} {score_text(one.score.mean, test.kind)}, forgetting {rise}"
            hints.append(Hint(x.place(a) - 9, SIDE - y.place(b) - 18, 18, 36, text))
    direction = "higher" if test.higher_is_better else "lower"
    left = " and further left" if against_forgetting else ""
    scaled = any(len(kept) > 1 for kept in lines.values())
    caption = f"{direction}{left} is better; strong: means over seeds, faint: each seed" + (
        "; along a line the trained update is scaled, ring: as trained" if scaled else ""
    )
    title = "Learning and forgetting" if against_forgetting else "The update, scaled"
    return Figure(title, x, y, tuple(m for m in marks if m.path), (), (), tuple(hints), caption, wide=True)


def _sweep(found: Analysis, colours: Mapping[str, int]) -> Figure | None:
    swept = {method.name: method for method in found.methods if any(one.validation is not None for one in method.sweep)}
    tried = [one for method in swept.values() for one in method.sweep]
    values = [one.validation for one in tried if one.validation is not None]
    if len({one.learning_rate for one in tried}) < 2 or not values:
        return None
    rates = sorted({one.learning_rate for one in tried})
    x = axis("learning rate", rates, logarithmic=True, margin=0.04, text=rate_text)
    if len(rates) <= _TICKS:
        x = replace(x, ticks=tuple(Tick(x.place(rate), rate_text(rate)) for rate in rates))
    y = axis("validation score", values, margin=0.08)
    worst = y.low if found.validation_higher_is_better else y.high
    marks, crosses, hints = [], [], []
    for name, method in swept.items():
        points = [(one.learning_rate, one.validation) for one in method.sweep if one.validation is not None]
        marks.append(Mark("line", colours[name], stroke(points, x, y)))
        marks.append(Mark("dots", colours[name], dots(points, x, y)))
        marks.append(Mark("chosen", colours[name], dots([p for p in points if p[0] == method.learning_rate], x, y)))
        crosses += [
            Note(colours[name], x.place(o.learning_rate), y.place(worst), name) for o in method.sweep if o.failure is not None
        ]
        for rate, value in points:
            text = f"{name} at {rate_text(rate)}: {value:.4f}"
            hints.append(Hint(x.place(rate) - 9, SIDE - y.place(value) - 18, 18, 36, text))
    caption = f"{'higher' if found.validation_higher_is_better else 'lower'} is better; ring: the rate chosen"
    caption += "; cross: diverged" if crosses else ""
    title = f"Validation score against learning rate, seed {found.question.sweep_seed}"
    return Figure(title, x, y, tuple(marks), tuple(crosses), (), tuple(hints), caption, wide=True)
