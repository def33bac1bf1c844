"""What the runs of `benchmarks.learning` show: tables in Markdown and a figure.

`python -m benchmarks.learning_report RUNS_DIR [--step-times FILE] [--markdown FILE] [--plot FILE.png]`
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.learning import STEPS, SWEEP_SEED
from benchmarks.learning_figure import plot
from benchmarks.learning_statistics import (
    RESAMPLES,
    Difference,
    Study,
    exact_difference,
    loss_difference,
    paired_outcomes,
    rate_text,
    read_records,
    select,
)
from benchmarks.results import markdown
from bonetune.errors import InputError
from bonetune.evaluation import Proportion, sign_test
from bonetune.files import write_text

NONE = "-"
READING = f"""\
Each is the method minus the reference on the same items: the mean over the seeds that both have. A negative test loss and a
positive exact match are in the method's favour. The items of a seed share one trained model, so the interval to rely on is
Student's t over the seeds' differences; it is wide, for few seeds say little. The two-level bootstrap (seeds, then items;
{RESAMPLES:,} resamples) knows no more seeds than there are and is too narrow where seeds differ. McNemar's exact test pools
the items and takes the trained models as given: it says whether these models differ, not whether the methods do. Nothing
here covers the choice of the learning rate, made on one seed, or the number of comparisons. A dash ({NONE}) stands for too few
seeds, a diverged run, or seeds that agree to the last digit and leave no spread to judge by."""
TWINS = """\
Each of these pairs computes one function, from the same data and seeds, at the same learning rate. What separates the two is
rounding: by chance, or because one rounds away more than the other. Differences of that size between other methods say
nothing about the functions they compute."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning_report", description=__doc__)
    parser.add_argument("runs", type=Path, metavar="RUNS_DIR", help="the folder that benchmarks.learning wrote")
    parser.add_argument("--step-times", type=Path, metavar="FILE", help="what `benchmarks.learning --step-times` wrote")
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


def step_seconds(file: Path) -> dict[str, float]:
    """CPU seconds of a training step by method, as `python -m benchmarks.learning --step-times` writes them."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        seconds = {name: float(value) for name, value in content.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file} is no map of methods to CPU seconds ({error}): `python -m benchmarks.learning --step-times` writes one."
        ) from error
    for name, value in seconds.items():
        if not 0 < value < math.inf:
            raise InputError(f"{file} gives {value} CPU seconds for `{name}`: measure again.")
    return seconds


def report(study: Study, references: Sequence[str], seconds: dict[str, float] | None = None) -> str:
    """The whole report in Markdown. `seconds`: CPU seconds of a training step, by method."""
    unknown = [name for name in references if name not in study.methods]
    if unknown:
        raise InputError(f"No method is called {unknown[0]!r}: choose references among {', '.join(study.methods)}.")
    parts = [
        "## Choosing the learning rate",
        f"Validation loss of seed {SWEEP_SEED} in nats per token; the best in bold.",
        sweep_table(study),
        "Without a sweep, for their function is another's: "
        + ", ".join(f"`{name}` takes the rate of `{origin}`" for name, origin in study.twins.items())
        + ".",
        "## What was learned",
        main_table(study, seconds),
        parameters_sentence(study),
        "Test loss in nats per token. Exact match over all items; Wilson's 95% interval takes the models as given.",
    ]
    if len({tuple(runs) for runs in study.counting.values() if runs}) > 1:
        parts.append("Means over different seeds do not compare, for some seeds are harder; the paired differences below do.")
    if seconds is not None:
        parts.append(
            f"CPU seconds (of all threads of the process): {STEPS} times those of a training step, which were measured "
            "interleaved with the other methods' steps, apart from the runs."
        )
    for reference in references:
        parts += [f"## Differences to `{reference}`", *_difference_tables(study, reference)]
    parts += ["## How to read the differences", READING]
    twins = [pair for pair in study.twins.items() if pair[0] in study.comparable(pair[1])]
    if twins:
        parts += ["## The control: same function, other rounding", TWINS]
        parts.append("\n".join(f"* {control_sentence(study, name, origin)}" for name, origin in twins))
    remarks = list(study.remarks)
    if seconds is not None:
        remarks += [f"No step time is given for `{name}`." for name in study.methods if name not in seconds]
    origins = {record.origin for runs in (study.sweep, study.counting) for of in runs.values() for record in of.values()}
    remarks.append(f"Trained with {'; '.join(sorted(origins))}.")
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

    return markdown(["method", *map(rate_text, rates)], [[name, *(cell(name, rate) for rate in rates)] for name in swept])


def main_table(study: Study, seconds: dict[str, float] | None = None) -> str:
    """A row a method: what was trained, how well it does on the test problems, how long it takes."""
    header = ["method", "trainable parameters", "learning rate", "test loss", "by seed: " + ", ".join(map(str, study.seeds))]
    header += ["exact match", *([f"CPU seconds for {STEPS} steps"] if seconds is not None else []), "seeds"]
    rows = []
    for name in study.methods:
        runs, parameters = study.counting[name], study.parameters(name)
        losses = {seed: record.test_loss for seed, record in runs.items()}
        row = [name, NONE if parameters is None else f"{parameters:,}"]
        row += [rate_text(study.rates[name]) if name in study.rates else NONE]
        row += [_number(float(np.mean(list(losses.values()))), "{:.4f}") if runs else NONE]
        row += [", ".join(_number(losses[seed], "{:.4f}") if seed in losses else NONE for seed in study.seeds)]
        row += [str(Proportion.of([bool(c) for run in runs.values() for c in run.correct])) if runs else NONE]
        if seconds is not None:
            row += [f"{STEPS * seconds[name]:.1f}" if name in seconds else NONE]
        rows.append([*row, f"{len(runs)} of {len(study.seeds)}"])
    return markdown(header, rows)


def parameters_sentence(study: Study, reference: str = "bone") -> str:
    """How well the methods' trainable parameters match."""
    counts = {name: count for name in study.methods if (count := study.parameters(name)) is not None}
    if len(set(counts.values())) == 1:
        return "All methods have the same number of trainable parameters."
    if reference not in counts:
        return "Trainable parameters are matched only approximately."
    share = {name: count / counts[reference] - 1 for name, count in counts.items()}
    fewest, most = (
        f"{share[name]:+z.1%} (`{name}`)" for name in (min(share, key=share.__getitem__), max(share, key=share.__getitem__))
    )
    return (
        "Trainable parameters are matched only approximately: relative to the "
        f"{counts[reference]:,} of `{reference}`, they range from {fewest} to {most}."
    )


def loss_table(study: Study, reference: str) -> str:
    """Differences of the test loss to a reference."""
    shared = study.comparable(reference)
    rows = [
        _difference_row(name, loss_difference(study.counting[name], study.counting[reference]), "{:+z.4f}") for name in shared
    ]
    return markdown(["method", "test loss", "95%, t over seeds", "by seed", "95%, bootstrap"], rows)


def exact_table(study: Study, reference: str) -> str:
    """Differences of the exact match to a reference, in percentage points."""
    rows = []
    for name in study.comparable(reference):
        method, other = study.counting[name], study.counting[reference]
        before, after = paired_outcomes(method, other)
        gained, lost = (sum(x and not y for x, y in zip(*pair, strict=True)) for pair in ((after, before), (before, after)))
        row = _difference_row(name, exact_difference(method, other), "{:+z.1f}", 100)
        rows.append([*row, f"{gained} : {lost}", f"{sign_test(before, after):.2g}"])
    header = ["method", "exact match, points", "95%, t over seeds", "by seed", "95%, bootstrap"]
    return markdown([*header, f"only it : only {reference}", "McNemar p"], rows)


def control_sentence(study: Study, name: str, origin: str) -> str:
    """How far two methods that compute the same function came apart."""
    method, reference = study.counting[name], study.counting[origin]
    loss, exact = loss_difference(method, reference), exact_difference(method, reference)
    before, after = paired_outcomes(method, reference)
    unlike = sum(b != a for b, a in zip(before, after, strict=True))
    nats = max((abs(value) for value in loss.by_seed.values()), key=lambda value: (math.isnan(value), value))
    points = 100 * max(abs(value) for value in exact.by_seed.values())
    return (
        f"`{name}` and `{origin}`: a seed's test loss differs by up to {_number(nats, '{:.4f}')} nats per token (mean "
        f"{_number(loss.mean, '{:+z.4f}')}), its exact match by up to {points:.1f} points (mean {100 * exact.mean:+z.1f}), "
        f"and {unlike} of {len(before)} items are answered exactly by only one of them."
    )


def _difference_tables(study: Study, reference: str) -> list[str]:
    if not study.comparable(reference):
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


def _number(value: float, form: str) -> str:
    return form.format(value) if math.isfinite(value) else "diverged"


def _interval(interval: tuple[float, float] | None, form: str, unit: float) -> str:
    return NONE if interval is None else "[{}, {}]".format(*(form.format(unit * bound) for bound in interval))


if __name__ == "__main__":
    main()
