"""The curves of a run, from the lines of its metrics.jsonl, and loss.png."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Points = list[tuple[float, float]]


def plot_loss(metrics: Sequence[dict[str, Any]], path: Path, title: str, unit: str | None = "nats a supervised token") -> None:
    """Draw the loss of each logged step, its running mean, and evaluation losses, to a PNG file."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display
    from matplotlib.ticker import MaxNLocator

    trained, evaluated = points(metrics, "loss"), points(metrics, "eval_loss")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    if trained:
        window = mean_window(len(trained))
        axes.plot(*zip(*trained, strict=True), color="tab:blue", alpha=0.35, linewidth=1, label="training loss")
        if window > 1:
            means = running_mean(trained, window)
            axes.plot(*zip(*means, strict=True), color="tab:blue", linewidth=2, label=f"mean of the last {window} values")
    if evaluated:
        axes.plot(*zip(*evaluated, strict=True), "o-", color="tab:orange", markersize=4, label="evaluation loss")
    axes.set(title=title, xlabel="optimizer step", ylabel=f"loss ({unit})" if unit else "loss", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if trained or evaluated:
        axes.legend()
    figure.savefig(path, dpi=120)


def points(metrics: Sequence[dict[str, Any]], name: str) -> Points:
    """(step, value) of each line that has the number `name`, finite or not."""
    return [(line["step"], float(line[name])) for line in metrics if is_number(line.get(name))]


def is_number(value: Any) -> bool:
    """Whether a value of a metrics.jsonl is a number, finite or not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def mean_window(count: int) -> int:
    """Over how many of `count` values their running mean is taken."""
    return max(1, min(count // 8, 100))


def running_mean(values: Points, window: int) -> Points:
    """The mean of each value and those before it, `window` in all; values that are not finite are left out of it."""
    steps, numbers = np.array(values, float).T
    finite = np.isfinite(numbers)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, numbers, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    ends = np.arange(1, len(numbers) + 1)
    starts = np.maximum(0, ends - window)
    with np.errstate(invalid="ignore"):
        means = (sums[ends] - sums[starts]) / (counts[ends] - counts[starts])
    return list(zip(steps.tolist(), means.tolist(), strict=True))


def tokens_per_second(metrics: Sequence[dict[str, Any]]) -> Points:
    """(step, tokens a second since the line before) of each training step logged; evaluations take no part in it."""
    rates: Points = []
    seconds, tokens = 0.0, 0
    for line in metrics:
        now, seen = line.get("seconds", seconds), line.get("tokens", tokens)
        if "loss" in line and now > seconds and seen > tokens:
            rates.append((line["step"], (seen - tokens) / (now - seconds)))
        seconds, tokens = now, seen
    return rates


def evaluated(metrics: Sequence[dict[str, Any]]) -> dict[str, Points]:
    """What was measured on held-out rows, `eval_loss` first: (step, value) of each, by name."""
    names = dict.fromkeys(name for line in metrics for name in line if name.startswith("eval_") and is_number(line[name]))
    return {name: points(metrics, name) for name in sorted(names, key=lambda name: name != "eval_loss")}
