"""The figure of `benchmarks.learning_report`: how the training losses of the runs that count fall."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure  # not pyplot: no global state, no display
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.learning import STEPS
from benchmarks.learning_statistics import Study

WINDOW = 5  # steps in the running mean
# Okabe and Ito's colours without their yellow, which is faint on white
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000", "#56B4E9")


def plot(study: Study, seconds: dict[str, float] | None, file: Path) -> None:
    """Write `draw`'s figure to a PNG."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draw(study, seconds).savefig(file, dpi=130)


def draw(study: Study, seconds: dict[str, float] | None = None) -> Figure:
    """The training losses against steps and, if the CPU `seconds` of a step are given by method, against time."""
    width = 7.5 if seconds is None else 13
    figure = Figure(figsize=(width, 5.8), layout="constrained")
    panels = figure.subplots(1, 1 if seconds is None else 2, sharey=True, squeeze=False)[0]
    distances = {name: distance(study, name, origin) for name, origin in study.twins.items()}
    shown = [name for name in study.methods if study.counting[name] and distances.get(name) is None]
    ends = _draw(panels[0], study, dict.fromkeys(shown, 1.0))
    panels[0].set(xlabel="training step", ylabel=f"training loss, nats per token (mean of the last {WINDOW} steps)")
    if seconds is not None:
        _draw(panels[1], study, {name: seconds[name] for name in shown if name in seconds})
        panels[1].set(xlabel="CPU seconds of all threads (steps times those of one step)")
        panels[1].set_title("one step: measured interleaved, apart from the runs", fontsize=10, loc="left")
    _label(panels[0], study, ends)  # one column of names, between the panels, serves both
    crosses = "; cross: a diverged run, not in the mean" if any(study.diverged_seeds(name) for name in shown) else ""
    seeds = ", ".join(map(str, study.seeds))
    figure.suptitle("How fast each method learns to reverse lists of words", fontsize=15)
    panels[0].set_title(f"line: mean of seeds {seeds}; band: their range{crosses}", fontsize=10, loc="left")
    omitted = [
        f"{name} (as {study.twins[name]}; never further off than {far:.0%})"
        for name, far in distances.items()
        if far is not None
    ]
    if omitted:
        caption = (
            f"Not drawn, for they compute the function of one that is drawn and differ in rounding alone: {', '.join(omitted)}."
        )
        figure.supxlabel(textwrap.fill(caption, int(13 * width), break_on_hyphens=False), x=0.01, ha="left", fontsize=10)
    return figure


def distance(study: Study, name: str, origin: str) -> float | None:
    """How far one method's line lies from another's at most, relative to that: of the mean over the seeds that both have.

    None if they share no seed, or if a run of either diverged.
    """
    runs, others = study.counting[name], study.counting[origin]
    shared = sorted(runs.keys() & others.keys())
    if not shared or study.diverged_seeds(name) or study.diverged_seeds(origin):
        return None
    mine, other = (np.mean([running_mean(of[seed].training_losses) for seed in shared], axis=0) for of in (runs, others))
    return float(np.max(np.abs(mine / other - 1)))


def running_mean(losses: Sequence[float], window: int = WINDOW) -> list[float]:
    """The mean of the last `window` values at each place; of those there are, at the first places."""
    return [float(np.mean(losses[max(0, i + 1 - window) : i + 1])) for i in range(len(losses))]


def spread(places: Sequence[float], gap: float) -> list[float]:
    """The ascending places nearest to the given ones, in least squares, that lie at least `gap` apart."""
    free = [
        place - gap * i for i, place in enumerate(places)
    ]  # these need only ascend: isotonic regression by its min-max formula
    ends = range(1, len(free) + 1)
    return [
        gap * i + max(min(float(np.mean(free[j:k])) for k in ends if k > i) for j in range(i + 1)) for i in range(len(free))
    ]


def _draw(axes: Any, study: Study, scale: dict[str, float]) -> dict[str, tuple[float, float]]:
    """Draw the methods of `scale`, which holds a step's width; return where their lines end."""
    ends: dict[str, tuple[float, float]] = {}
    for name, step in scale.items():
        style = _style(study, name)
        smooth = {seed: running_mean(run.training_losses[: run.finite_steps]) for seed, run in study.counting[name].items()}
        broken = study.diverged_seeds(name)
        for seed in broken:
            if smooth[seed]:
                places = step * np.arange(1, len(smooth[seed]) + 1)
                axes.plot(places, smooth[seed], **(style | {"linewidth": 0.8}))
                axes.plot(places[-1], smooth[seed][-1], "x", color=style["color"], markersize=10, markeredgewidth=2, zorder=5)
                ends[name] = (places[-1], smooth[seed][-1])
        whole = np.array([losses for seed, losses in smooth.items() if seed not in broken])
        if len(whole):
            places = step * np.arange(1, whole.shape[1] + 1)
            axes.fill_between(places, whole.min(0), whole.max(0), color=style["color"], alpha=0.1, linewidth=0)
            axes.plot(places, whole.mean(0), **style)
            axes.plot(places[-1], whole.mean(0)[-1], "o", color=style["color"], markersize=4)
            ends[name] = (places[-1], whole.mean(0)[-1])
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelleft=True)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(0, 1.01 * max((x for x, _ in ends.values()), default=STEPS))
    return ends


def _label(axes: Any, study: Study, ends: dict[str, tuple[float, float]]) -> None:
    """Write each method's name right of the panel, as near to the end of its line as the names leave room for."""
    low, high = np.log(axes.get_ylim())
    names = sorted(ends, key=lambda name: ends[name][1])
    heights = spread([(math.log(ends[name][1]) - low) / (high - low) for name in names], 0.05)
    for name, height in zip(names, heights, strict=True):
        seeds, broken = ", ".join(map(str, study.counting[name])), study.diverged_seeds(name)
        notes = [f"seeds {seeds}"] if len(study.counting[name]) < len(study.seeds) else []
        notes += [f"\N{MULTIPLICATION SIGN} seed {', '.join(map(str, broken))}"] if broken else []
        colour = _style(study, name)["color"]
        axes.annotate(
            f"{name} ({'; '.join(notes)})" if notes else name,
            xy=ends[name],
            xytext=(1.06, height),
            textcoords="axes fraction",
            color=colour,
            va="center",
            fontsize=11,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7, "relpos": (0, 0.5), "shrinkA": 2, "shrinkB": 3},
        )


def _style(study: Study, name: str) -> dict[str, Any]:
    if name in study.twins:  # drawn only where it cannot be shown to lie on its origin's line
        return {"color": "#555555", "linewidth": 1.6, "linestyle": (0, (4, 2))}
    own = [method for method in study.methods if method not in study.twins].index(name)
    return {"color": PALETTE[own % len(PALETTE)], "linewidth": 1.6, "linestyle": "-" if own < len(PALETTE) else ":"}
