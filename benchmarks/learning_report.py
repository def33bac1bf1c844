"""What the runs of `benchmarks.learning` show: tables in Markdown and a figure.

`python -m benchmarks.learning_report RUNS_DIR [--step-times BENCH_JSON] [--markdown FILE] [--plot FILE.png]`

What three seeds can say. The items of a run share one trained model, so what repeats is the seed: the main interval of a
difference is Student's t over the seeds' paired differences, with 2 degrees of freedom for three seeds. It is wide, and right
for new seeds with new problems if these differences are roughly normal. The two-level bootstrap (seeds, then items) knows no
more seeds than there are and is too narrow where seeds differ; McNemar's test and Wilson's interval take the trained models as
given and speak of new items only. No interval covers the choice of the learning rate, made on one seed, or allows for the
number of comparisons.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure  # not pyplot: no global state, no display
from matplotlib.ticker import LogLocator, NullFormatter
from scipy import stats

from benchmarks.learning import METHODS, SEEDS, STEPS, SWEEP_SEED
from bonetune.errors import InputError
from bonetune.evaluation import Proportion, sign_test
from bonetune.files import write_text

RESAMPLES, BOOTSTRAP_SEED = 10_000, 0
WINDOW = 5  # steps in the figure's running mean
# Okabe and Ito's colours without their yellow, which is faint on white
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000", "#56B4E9")
NONE = "-"
READING = f"""\
Each is the method minus the reference on the same items: the mean over the seeds that both have. A negative test loss and a
positive exact match are in the method's favour. The items of a seed share one trained model, so the interval to rely on is
Student's t over the seeds' differences; it is wide, for few seeds say little. The two-level bootstrap (seeds, then items;
{RESAMPLES:,} resamples) knows no more seeds than there are and is too narrow where seeds differ. McNemar's exact test pools
the items and takes the trained models as given: it says whether these models differ, not whether the methods do. Nothing
here covers the choice of the learning rate, made on one seed, or the number of comparisons. A dash ({NONE}) stands for too few
seeds, a diverged run, or seeds that agree to the last digit and leave no spread to judge by."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning_report", description=__doc__)
    parser.add_argument("runs", type=Path, metavar="RUNS_DIR", help="the folder that benchmarks.learning wrote")
    parser.add_argument("--step-times", type=Path, metavar="BENCH_JSON", help="what `python -m benchmarks --json` wrote")
    parser.add_argument("--references", default="lora,bone", help="methods to take differences to, separated by commas")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the report here")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the training losses here")
    arguments = parser.parse_args()
    try:
        study = select(read_records(arguments.runs))
        seconds = step_seconds(arguments.step_times) if arguments.step_times else None
        text = report(study, arguments.references.split(","), seconds)
    except (InputError, OSError) as error:
        parser.error(str(error))
    print(text)
    if arguments.markdown:
        write_text(arguments.markdown, text)
    if arguments.plot and any(study.counting.values()):
        plot(study, seconds, arguments.plot)
    elif arguments.plot:
        print(f"{arguments.plot} is not drawn: no run counts yet.")


def step_ratios(file: Path) -> dict[str, float]:
    """Seconds of each method's training step over those of the frozen model's step."""
    return {row["method"]: row["ratio"] for row in json.loads(file.read_text())["step"]}


def step_seconds(file: Path) -> dict[str, float]:
    """Seconds of each method's training step."""
    frozen = json.loads(file.read_text())["step_seconds"]
    return {method: ratio * frozen for method, ratio in step_ratios(file).items()}


@dataclass(frozen=True, eq=False)
class Record:
    """One run. The arrays hold a value for each test item; they are empty for runs of the sweep."""

    file: str
    method: str
    learning_rate: float
    seed: int
    parameters: int
    training_losses: list[float]
    validation_loss: float
    losses: np.ndarray
    tokens: np.ndarray
    correct: np.ndarray
    origin: str

    @property
    def test_loss(self) -> float:
        """Nats per supervised token."""
        return float(self.losses.sum() / self.tokens.sum())

    @property
    def finite_steps(self) -> int:
        """The number of steps before the first whose loss is not finite."""
        return next((i for i, loss in enumerate(self.training_losses) if not math.isfinite(loss)), len(self.training_losses))

    @property
    def diverged(self) -> bool:
        whole = self.finite_steps == len(self.training_losses) and math.isfinite(self.validation_loss)
        return not (whole and bool(np.isfinite(self.losses).all()))


@dataclass(frozen=True)
class Study:
    """The runs by what they are for.

    Args:
        methods: names in the order of the tables.
        sweep: the runs that chose learning rates, by method and rate.
        rates: the rate chosen for each method, as far as there is one.
        counting: the runs that count, by method and seed.
        remarks: what is missing or unusual, a sentence each.
    """

    methods: list[str]
    sweep: dict[str, dict[float, Record]]
    rates: dict[str, float]
    counting: dict[str, dict[int, Record]]
    remarks: list[str] = field(default_factory=list)


def read_records(folder: Path) -> list[Record]:
    """The records of a folder, sorted by name."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise InputError(f"{folder} holds no run: give the folder that `python -m benchmarks.learning --output` wrote.")
    return [_record(file) for file in files]


def select(records: Sequence[Record]) -> Study:
    """Sort the runs, take each method's best learning rate, and say what is missing."""
    methods = list(METHODS) + sorted({record.method for record in records} - set(METHODS))
    study = Study(methods, {name: {} for name in methods}, {}, {name: {} for name in methods})
    for record in sorted(records, key=lambda record: record.learning_rate):
        if record.seed == SWEEP_SEED:
            study.sweep[record.method][record.learning_rate] = record
    for name in methods:
        ended = [record for record in study.sweep[_same_function(name) or name].values() if not record.diverged]
        if ended:
            study.rates[name] = min(ended, key=lambda record: record.validation_loss).learning_rate
    for record in sorted(records, key=lambda record: record.seed):
        if record.seed == SWEEP_SEED:
            continue
        if record.learning_rate == study.rates.get(record.method):
            study.counting[record.method][record.seed] = record
        else:
            study.remarks.append(f"`{record.file}` does not count: that rate is not the one chosen for `{record.method}`.")
    for name in methods:
        study.remarks.extend(_missing(study, name))
    for record in records:
        if record.diverged:
            where = f"{_rate(record.learning_rate)}, seed {record.seed}"
            steps = f"{record.finite_steps} of {STEPS} steps have a finite loss"
            study.remarks.append(f"`{record.method}` diverged at {where}: {steps}.")
    return study


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's interval of 95% for the mean; none if a value is not finite or there is no spread to judge by."""
    n, mean = len(values), float(np.mean(values))
    if n < 2 or not math.isfinite(mean) or min(values) == max(values):
        return None
    half = float(stats.t.ppf(0.975, n - 1)) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return mean - half, mean + half


def two_level_bootstrap(
    groups: Sequence[tuple[np.ndarray, np.ndarray]], resamples: int = RESAMPLES, seed: int = BOOTSTRAP_SEED
) -> np.ndarray:
    """Resampled means over groups of sum(values) / sum(weights).

    Args:
        groups: values and weights of each group's items.

    Returns:
        The statistic of each resample, (resamples,): as many groups as there are, drawn with replacement, and of each drawn
        group as many items as it has, drawn anew for each time the group is drawn.
    """
    rng = np.random.default_rng(seed)
    total = np.zeros(resamples)
    for _ in groups:
        drawn = rng.integers(len(groups), size=resamples)
        for index, (values, weights) in enumerate(groups):
            here = drawn == index
            items = rng.integers(len(values), size=(int(here.sum()), len(values)))
            total[here] += values[items].sum(1) / weights[items].sum(1)
    return total / len(groups)


@dataclass(frozen=True)
class Difference:
    """A method minus its reference, on the items of the seeds that both have.

    Args:
        by_seed: the difference of each seed.
        bootstrap: the two-level bootstrap's percentile interval of 95%; none for a single seed or a diverged run.
    """

    by_seed: dict[int, float]
    bootstrap: tuple[float, float] | None

    @property
    def mean(self) -> float:
        """The mean over seeds, each counting alike."""
        return float(np.mean(list(self.by_seed.values())))

    @property
    def interval(self) -> tuple[float, float] | None:
        return t_interval(list(self.by_seed.values()))


Runs = dict[int, Record]


def loss_difference(method: Runs, reference: Runs) -> Difference:
    """Of the test loss, in nats per token: a seed's items weigh as many as they have tokens, as in the loss itself."""
    return _difference(method, reference, lambda a, b: (a.losses - b.losses, a.tokens))


def exact_difference(method: Runs, reference: Runs) -> Difference:
    """Of the share of items answered exactly."""
    return _difference(method, reference, lambda a, b: (a.correct * 1.0 - b.correct, np.ones(len(a.correct))))


def paired_outcomes(method: Runs, reference: Runs) -> tuple[list[bool], list[bool]]:
    """Whether each item was answered exactly, by the reference and by the method, over the seeds that both have."""
    pairs = _pairs(method, reference)
    before = [bool(right) for _, b in pairs for right in b.correct]
    return before, [bool(right) for a, _ in pairs for right in a.correct]


def running_mean(losses: Sequence[float], window: int = WINDOW) -> list[float]:
    """The mean of the last `window` values at each place; of those there are, at the first places."""
    return [float(np.mean(losses[max(0, i + 1 - window) : i + 1])) for i in range(len(losses))]


def report(study: Study, references: Sequence[str], seconds: dict[str, float] | None = None) -> str:
    """The whole report in Markdown. `seconds`: of a training step, by method."""
    unknown = [name for name in references if name not in study.methods]
    if unknown:
        raise InputError(f"No method is called {unknown[0]!r}: choose references among {', '.join(study.methods)}.")
    parts = [
        "## Choosing the learning rate",
        f"Validation loss of seed {SWEEP_SEED} in nats per token; the best in bold.",
        sweep_table(study),
        *(f"`{name}` takes the rate of `{origin}`." for name, origin in _twins(study)),
        "## What was learned",
        main_table(study, seconds),
        "Test loss in nats per token. Exact match over all items; Wilson's 95% interval takes the models as given.",
    ]
    if len({tuple(runs) for runs in study.counting.values() if runs}) > 1:
        parts.append("Means over different seeds do not compare, for some seeds are harder; the paired differences below do.")
    if seconds is not None:
        parts.append(f"Seconds: {STEPS} times the seconds of a training step, as measured on its own.")
    for reference in references:
        parts += [f"## Differences to `{reference}`", *_difference_tables(study, reference)]
    parts += ["## How to read the differences", READING]
    parts += [control_sentence(study, name, origin) for name, origin in _twins(study) if name in _comparable(study, origin)]
    remarks = list(study.remarks)
    if seconds is not None:
        remarks += [f"No step time is given for `{name}`." for name in study.methods if name not in seconds]
    origins = sorted(
        {record.origin for runs in (study.sweep, study.counting) for of in runs.values() for record in of.values()}
    )
    remarks.append(f"Trained with {'; '.join(origins)}.")
    parts += ["## Remarks", "\n".join(f"* {remark}" for remark in remarks)]
    return "\n\n".join(parts) + "\n"


def sweep_table(study: Study) -> str:
    """A row a method that has a sweep, a column a learning rate."""
    swept = [name for name in study.methods if study.sweep[name]]
    rates = sorted({rate for name in swept for rate in study.sweep[name]})

    def cell(name: str, rate: float) -> str:
        record = study.sweep[name].get(rate)
        if record is None:
            return ""
        shown = "diverged" if record.diverged else f"{record.validation_loss:.4f}"
        return f"**{shown}**" if rate == study.rates.get(name) else shown

    return _table(["method", *map(_rate, rates)], [[name, *(cell(name, rate) for rate in rates)] for name in swept])


def main_table(study: Study, seconds: dict[str, float] | None = None) -> str:
    """A row a method: what was trained, how well it does on the test problems, how long it takes."""
    seeds = _seeds(study)
    header = ["method", "trainable parameters", "learning rate", "test loss", "by seed: " + ", ".join(map(str, seeds))]
    header += ["exact match", *([f"seconds for {STEPS} steps"] if seconds is not None else []), "seeds"]
    rows = []
    for name in study.methods:
        runs = study.counting[name]
        losses = {seed: record.test_loss for seed, record in runs.items()}
        known = next(iter([*runs.values(), *study.sweep[name].values()]), None)
        row = [name, f"{known.parameters:,}" if known else NONE, _rate(study.rates[name]) if name in study.rates else NONE]
        row += [_number(float(np.mean(list(losses.values()))), "{:.4f}") if runs else NONE]
        row += [", ".join(_number(losses[seed], "{:.4f}") if seed in losses else NONE for seed in seeds)]
        row += [str(Proportion.of([bool(c) for run in runs.values() for c in run.correct])) if runs else NONE]
        if seconds is not None:
            row += [f"{STEPS * seconds[name]:.1f}" if name in seconds else NONE]
        rows.append([*row, f"{len(runs)} of {len(seeds)}"])
    return _table(header, rows)


def loss_table(study: Study, reference: str) -> str:
    """Differences of the test loss to a reference."""
    shared = _comparable(study, reference)
    rows = [
        _difference_row(name, loss_difference(study.counting[name], study.counting[reference]), "{:+z.4f}") for name in shared
    ]
    return _table(["method", "test loss", "95%, t over seeds", "by seed", "95%, bootstrap"], rows)


def exact_table(study: Study, reference: str) -> str:
    """Differences of the exact match to a reference, in percentage points."""
    rows = []
    for name in _comparable(study, reference):
        method, other = study.counting[name], study.counting[reference]
        before, after = paired_outcomes(method, other)
        gained, lost = (sum(x and not y for x, y in zip(*pair, strict=True)) for pair in ((after, before), (before, after)))
        row = _difference_row(name, exact_difference(method, other), "{:+z.1f}", 100)
        rows.append([*row, f"{gained} : {lost}", f"{sign_test(before, after):.2g}"])
    header = ["method", "exact match, points", "95%, t over seeds", "by seed", "95%, bootstrap"]
    return _table([*header, f"only it : only {reference}", "McNemar p"], rows)


def control_sentence(study: Study, name: str, origin: str) -> str:
    """How far two methods that compute the same function came apart."""
    method, reference = study.counting[name], study.counting[origin]
    loss, exact = loss_difference(method, reference), exact_difference(method, reference)
    before, after = paired_outcomes(method, reference)
    unlike = sum(b != a for b, a in zip(before, after, strict=True))
    nats = max((abs(value) for value in loss.by_seed.values()), key=lambda value: (math.isnan(value), value))
    points = 100 * max(abs(value) for value in exact.by_seed.values())
    return (
        f"The control for noise: `{name}` computes the same function as `{origin}`, from the same data and seeds, and only "
        f"rounds differently. Between the two a seed's test loss differs by up to {_number(nats, '{:.4f}')} nats per token "
        f"(mean {_number(loss.mean, '{:+z.4f}')}), its exact match by up to {points:.1f} points (mean "
        f"{100 * exact.mean:+z.1f}), and {unlike} of {len(before)} items are answered exactly by only one of them. Differences "
        "of that size between other methods say nothing about the methods."
    )


def plot(study: Study, seconds: dict[str, float] | None, file: Path) -> None:
    """Draw the training losses of the runs that count against steps and, if `seconds` of a step are given, against time."""
    figure = Figure(figsize=(7.5 if seconds is None else 13, 5.8), layout="constrained")
    panels = figure.subplots(1, 1 if seconds is None else 2, sharey=True, squeeze=False)[0]
    shown = [name for name in study.methods if study.counting[name]]
    ends = _draw(panels[0], study, dict.fromkeys(shown, 1.0))
    panels[0].set(xlabel="training step", ylabel=f"training loss, nats per token (mean of the last {WINDOW} steps)")
    if seconds is not None:
        _draw(panels[1], study, {name: seconds[name] for name in shown if name in seconds})
        panels[1].set(xlabel="seconds of training (steps times the measured seconds of a step)")
    _label(panels[0], study, ends)  # one column of names, between the panels, serves both
    crosses = "; cross: a diverged run, not in the mean" if any(_diverged_seeds(study, name) for name in shown) else ""
    seeds = ", ".join(map(str, _seeds(study)))
    figure.suptitle("How fast each method learns to reverse lists of words", fontsize=15)
    panels[0].set_title(f"line: mean of seeds {seeds}; band: their range{crosses}", fontsize=10, loc="left")
    figure.savefig(file, dpi=130)


def spread(places: Sequence[float], gap: float) -> list[float]:
    """The ascending places nearest to the given ones, in least squares, that lie at least `gap` apart."""
    free = [
        place - gap * i for i, place in enumerate(places)
    ]  # these need only ascend: isotonic regression by its min-max formula
    ends = range(1, len(free) + 1)
    return [
        gap * i + max(min(float(np.mean(free[j:k])) for k in ends if k > i) for j in range(i + 1)) for i in range(len(free))
    ]


def _record(file: Path) -> Record:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        items = content.get("test_items", [])
        losses = np.array([item["loss"] for item in items], dtype=float)
        record = Record(
            file=file.name,
            method=content["method"],
            learning_rate=content["learning_rate"],
            seed=content["seed"],
            parameters=content["parameters"],
            training_losses=content["training_losses"],
            validation_loss=content["validation_loss"],
            losses=np.where(np.isfinite(losses), losses, np.nan),  # an infinite one less another would warn
            tokens=np.array([item["tokens"] for item in items], dtype=float),
            correct=np.array([item["correct"] for item in items], dtype=bool),
            origin=f"torch {content['torch']} at commit {content['commit'] or 'unknown'}",
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is no record of a run ({type(error).__name__}: {error}): move it away.") from error
    if record.seed != SWEEP_SEED and not items:
        raise InputError(f"{file} has no test items: delete it and train that run again.")
    if not record.diverged and len(record.training_losses) != STEPS:
        raise InputError(f"{file} has {len(record.training_losses)} steps, not {STEPS}: delete it and train that run again.")
    return record


def _same_function(name: str) -> str | None:
    return METHODS[name].same_function_as if name in METHODS else None


def _twins(study: Study) -> list[tuple[str, str]]:
    """Methods with the one whose function they share."""
    return [(name, origin) for name in study.methods if (origin := _same_function(name))]


def _seeds(study: Study) -> list[int]:
    return sorted({*SEEDS, *(seed for runs in study.counting.values() for seed in runs)})


def _missing(study: Study, name: str) -> list[str]:
    sentences = []
    swept = study.sweep[name]
    if not swept and not _same_function(name):
        sentences.append(f"`{name}` has no sweep.")
    elif swept and study.rates.get(name) in (None, min(swept), max(swept)):
        sentences.append(f"The sweep of `{name}` is not finished: its best rate does not lie inside its grid.")
    lacking = [str(seed) for seed in _seeds(study) if seed not in study.counting[name]]
    if lacking:
        sentences.append(f"`{name}` lacks seed{'s' * (len(lacking) > 1)} {', '.join(lacking)}.")
    return sentences


def _pairs(method: Runs, reference: Runs) -> list[tuple[Record, Record]]:
    pairs = [(method[seed], reference[seed]) for seed in sorted(method.keys() & reference.keys())]
    for a, b in pairs:
        if not np.array_equal(a.tokens, b.tokens):
            raise InputError(f"{a.file} and {b.file} were examined on different items: delete one and train that run again.")
    return pairs


def _difference(method: Runs, reference: Runs, of: Callable[[Record, Record], tuple[np.ndarray, np.ndarray]]) -> Difference:
    pairs = _pairs(method, reference)
    groups = [of(a, b) for a, b in pairs]
    by_seed = {a.seed: float(values.sum() / weights.sum()) for (a, _), (values, weights) in zip(pairs, groups, strict=True)}
    if len(groups) < 2 or not all(map(math.isfinite, by_seed.values())):
        return Difference(by_seed, None)
    low, high = np.quantile(two_level_bootstrap(groups), (0.025, 0.975))
    return Difference(by_seed, (float(low), float(high)))


def _comparable(study: Study, reference: str) -> list[str]:
    """The methods that share a seed with the reference."""
    others = [name for name in study.methods if name != reference]
    return [name for name in others if study.counting[name].keys() & study.counting[reference].keys()]


def _difference_tables(study: Study, reference: str) -> list[str]:
    if not _comparable(study, reference):
        return [f"None: no other method has a run that counts with a seed of `{reference}`."]
    return [loss_table(study, reference), exact_table(study, reference)]


def _difference_row(name: str, difference: Difference, form: str, unit: float = 1) -> list[str]:
    seeds = ", ".join(f"{seed}: {_number(unit * value, form)}" for seed, value in difference.by_seed.items())
    return [
        name,
        _number(unit * difference.mean, form),
        _interval(difference.interval, form, unit),
        seeds,
        _interval(difference.bootstrap, form, unit),
    ]


def _draw(axes: Any, study: Study, scale: dict[str, float]) -> dict[str, tuple[float, float]]:
    """Draw the methods of `scale`, which holds a step's width; return where their lines end."""
    ends: dict[str, tuple[float, float]] = {}
    for name, step in scale.items():
        style = _style(study, name)
        smooth = {seed: running_mean(run.training_losses[: run.finite_steps]) for seed, run in study.counting[name].items()}
        broken = _diverged_seeds(study, name)
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
        seeds, broken = ", ".join(map(str, study.counting[name])), _diverged_seeds(study, name)
        notes = [f"seeds {seeds}"] if len(study.counting[name]) < len(_seeds(study)) else []
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
    if _same_function(name):  # it lies on the other's line
        return {"color": "#555555", "linewidth": 1.6, "linestyle": (0, (4, 2))}
    own = [method for method in study.methods if not _same_function(method)].index(name)
    return {"color": PALETTE[own % len(PALETTE)], "linewidth": 1.6, "linestyle": "-" if own < len(PALETTE) else ":"}


def _diverged_seeds(study: Study, name: str) -> list[int]:
    return [seed for seed, record in study.counting[name].items() if record.diverged]


def _rate(rate: float) -> str:
    mantissa, exponent = f"{rate:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _number(value: float, form: str) -> str:
    return form.format(value) if math.isfinite(value) else "diverged"


def _interval(interval: tuple[float, float] | None, form: str, unit: float) -> str:
    return NONE if interval is None else "[{}, {}]".format(*(form.format(unit * bound) for bound in interval))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


if __name__ == "__main__":
    main()
