"""`bonetune compare`: choose each method's learning rate, make the runs that count, and say what they show."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bonetune.evaluation.evaluate import prepare
from bonetune.evaluation.task import digest
from bonetune.evaluation.trained_with import TrainedWith
from bonetune.experiments.engines import Engine, Job, engine
from bonetune.experiments.findings import Analysis, Question
from bonetune.experiments.folder import SETTINGS_FILE, check_folder, claimed
from bonetune.experiments.matching import Sized, reference_of, sized
from bonetune.experiments.outcome import Outcome, Trial, read_curve
from bonetune.experiments.overlap import shared_rows
from bonetune.experiments.page import REPORT_FILE
from bonetune.experiments.report import write_report
from bonetune.experiments.settings import OF_THE_METHOD, Comparison, Examination, load_comparison
from bonetune.experiments.tables import RESULTS_FILE
from bonetune.experiments.trial import RUNS, folder_of, known_outcome, perform
from bonetune.formats.checkpoint import fingerprint_of
from bonetune.training import plan
from bonetune.training.config import RunConfig


@dataclass(frozen=True)
class Progress:
    """A run that is done.

    Args:
        outcome: what came of it.
        counts: whether it is one that counts, or was made to choose a rate.
        done, known: runs done so far, and runs known to be needed; a sweep may need more.
    """

    outcome: Outcome
    counts: bool
    done: int
    known: int


@dataclass
class _Sweep:
    """The search for one method's learning rate."""

    rates: list[float]
    outcomes: dict[float, Outcome]
    most: int
    fixed: bool

    def grow(self) -> list[float]:
        """Rates to try next: those of the grid that have no run, else one beyond its edge where that is the best."""
        missing = [rate for rate in self.rates if rate not in self.outcomes]
        if missing or self.fixed or len(self.rates) >= self.most:
            return missing
        if self.best in (self.rates[0], None):
            self.rates.insert(0, float(f"{self.rates[0] ** 2 / self.rates[1]:.6g}"))
        elif self.best == self.rates[-1]:
            self.rates.append(float(f"{self.rates[-1] ** 2 / self.rates[-2]:.6g}"))
        return [rate for rate in self.rates if rate not in self.outcomes]

    @property
    def best(self) -> float | None:
        """The rate with the best validation score; None if every run fell apart, a smaller one of equals."""
        scored = [(rate, o) for rate, o in sorted(self.outcomes.items()) if o.failure is None and o.validation is not None]
        if not scored:
            return None
        sign = -1.0 if scored[0][1].validation_higher_is_better else 1.0
        return min(scored, key=lambda pair: sign * (pair[1].validation or 0.0))[0]


@dataclass(frozen=True)
class Runs:
    """All runs of a comparison.

    Args:
        comparison: its settings.
        sizes: of the methods.
        sweeps: the runs that the rates were chosen by: method, rate.
        rates: the rates chosen.
        counting: the runs that count: method, seed.
    """

    comparison: Comparison
    sizes: dict[str, Sized]
    sweeps: dict[str, dict[float, Outcome]]
    rates: dict[str, float]
    counting: dict[str, dict[int, Outcome]]

    @property
    def reference(self) -> str | None:
        """The method whose trainable parameters the others match; None: none had to."""
        return reference_of(self.comparison)


@dataclass(frozen=True)
class MethodPlan:
    """A method of a comparison before its first run.

    Args:
        sized: its size.
        rates: the learning rates that its sweep begins with.
        described: what it trains, in a few words.
    """

    sized: Sized
    rates: tuple[float, ...]
    described: str


@dataclass(frozen=True)
class ComparisonPlan:
    """A comparison that has passed all checks before its first run.

    Args:
        methods: with their sizes and first rates.
        data: fingerprints of the model, of the rows that are trained on, and of those of each examination.
        notes: what is remarkable, a sentence each.
    """

    methods: list[MethodPlan]
    data: dict[str, str | None]
    notes: list[str]

    @property
    def sizes(self) -> dict[str, Sized]:
        """The methods' sizes, by name."""
        return {method.sized.name: method.sized for method in self.methods}


def plan_comparison(comparison: Comparison) -> ComparisonPlan:
    """Check all that can be checked before the first run: every run's settings, the model, the data, the tasks.

    Nothing is written. Raises `InputError` as `compare` does.
    """
    sizes = sized(comparison)
    methods = []
    for name, size in sizes.items():
        config = comparison.run(name, size.r, 1e-4, comparison.sweep_seed, Path(comparison.output_dir) / RUNS)
        methods.append(MethodPlan(size, comparison.grid(name, config), config.method_in_words))
    data: dict[str, str | None] = {}
    for name, others in _own_settings(comparison).items():
        if data and not others:
            continue
        planned = plan(comparison.run(name, sizes[name].r, 1e-4, comparison.sweep_seed, Path(comparison.output_dir) / "plan"))
        whose = f" of {name}" if others else ""
        data[f"model{whose}"] = fingerprint_of(planned.config.model_name_or_path, fetch=True)
        data[f"train{whose}"] = planned.train.fingerprint()
        run = TrainedWith(
            planned.config.model_dump(mode="json"), planned.row_format.kind, planned.row_format.fields, planned.opened
        )
        for place, examination in enumerate(_examinations(comparison)):
            prepared = prepare(examination.tasks, task_type=planned.config.task_type, run=run, **examination.arguments())
            for task, one in prepared.items():
                data[f"{examination.called(task) if place else 'validation'}{whose}"] = digest(one.identity)
    return ComparisonPlan(methods, data, [*_unlike(comparison), *shared_rows(comparison, _usual_run(comparison, sizes))])


def _examinations(comparison: Comparison) -> list[Examination]:
    """The validation, the tests, and the plain text."""
    return [comparison.validation, *comparison.tests, *([comparison.text] if comparison.text else [])]


def _own_settings(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """By method, the settings of its own that say how or on what it trains, not what; methods without any come first."""
    own = {
        name: {key: value for key, value in method.settings.items() if key not in OF_THE_METHOD}
        for name, method in comparison.methods.items()
    }
    return dict(sorted(own.items(), key=lambda pair: bool(pair[1])))


def _usual_run(comparison: Comparison, sizes: dict[str, Sized]) -> RunConfig:
    """A run of the first method that has no settings of its own, or, if each has some, of the first."""
    name = next(iter(_own_settings(comparison)))
    return comparison.run(name, sizes[name].r, 1e-4, comparison.sweep_seed, Path())


def _unlike(comparison: Comparison) -> list[str]:
    return [
        f"`{name}` is trained with settings of its own ({', '.join(f'{key}: {value}' for key, value in own.items())}): what "
        "it shows may be theirs."
        for name, own in _own_settings(comparison).items()
        if own
    ]


def make_runs(
    comparison: Comparison,
    *,
    make: Engine,
    on_run: Callable[[Progress], None] | None = None,
    sizes: dict[str, Sized] | None = None,
) -> Runs:
    """Make the runs that are not there yet.

    Args:
        comparison: the settings.
        make: what makes them.
        on_run: called after each run.
        sizes: the methods', where they are known.
    """
    sizes = sizes or sized(comparison)
    progress = _Progress(on_run)
    sweeps = _swept(comparison, sizes, make, progress)
    rates = {name: _rate(name, comparison, sweeps) for name in comparison.methods}
    trials = [Trial(name, rate, seed) for seed in comparison.seeds for name, rate in rates.items() if rate is not None]
    outcomes = dict(zip(trials, _made(comparison, sizes, trials, True, make, progress), strict=True))
    counting: dict[str, dict[int, Outcome]] = {name: {} for name in comparison.methods}
    for trial, outcome in outcomes.items():
        counting[trial.method][trial.seed] = outcome
    tried = {name: sweep.outcomes for name, sweep in sweeps.items()}
    return Runs(comparison, sizes, tried, {name: rate for name, rate in rates.items() if rate is not None}, counting)


def _swept(comparison: Comparison, sizes: dict[str, Sized], make: Engine, progress: "_Progress") -> dict[str, _Sweep]:
    sweeps = {}
    for name, method in comparison.methods.items():
        if method.rate_of is None:
            rates = list(comparison.grid(name, comparison.run(name, sizes[name].r, 1e-4, 0, Path())))
            sweeps[name] = _Sweep(rates, {}, comparison.most_rates, fixed=len(rates) == 1)
    while True:
        open_ones = {name: sweep for name, sweep in sweeps.items() if not sweep.fixed}
        trials = [Trial(name, rate, comparison.sweep_seed) for name, sweep in open_ones.items() for rate in sweep.grow()]
        if not trials:
            return sweeps
        for trial, outcome in zip(trials, _made(comparison, sizes, trials, False, make, progress), strict=True):
            sweeps[trial.method].outcomes[trial.learning_rate] = outcome


def _rate(name: str, comparison: Comparison, sweeps: dict[str, _Sweep]) -> float | None:
    sweep = sweeps[comparison.methods[name].rate_of or name]
    return sweep.rates[0] if sweep.fixed else sweep.best


def _made(
    comparison: Comparison,
    sizes: dict[str, Sized],
    trials: Sequence[Trial],
    counts: bool,
    make: Engine,
    progress: "_Progress",
) -> list[Outcome]:
    """The outcomes of the trials, in their order; what is there already is not made again."""
    progress.expect(len(trials))
    found = {trial: known_outcome(comparison, trial, sizes[trial.method].r, counts=counts) for trial in trials}
    for outcome in found.values():
        if outcome is not None:
            progress.tell(outcome, counts)
    missing = [trial for trial, outcome in found.items() if outcome is None]
    jobs: list[Job] = [(perform, (comparison, trial, sizes[trial.method].r), {"counts": counts}) for trial in missing]
    for number, outcome in make(jobs) if jobs else ():
        found[missing[number]] = outcome
        progress.tell(outcome, counts)
    return [outcome for trial in trials if (outcome := found[trial]) is not None]


class _Progress:
    def __init__(self, on_run: Callable[[Progress], None] | None) -> None:
        self.on_run, self.done, self.known = on_run, 0, 0

    def expect(self, runs: int) -> None:
        self.known += runs

    def tell(self, outcome: Outcome, counts: bool) -> None:
        self.done += 1
        if self.on_run is not None:
            self.on_run(Progress(outcome, counts, self.done, self.known))


@dataclass(frozen=True)
class ComparisonResult:
    """What a comparison left.

    Args:
        analysis: what the runs show.
        report: the page that says it, which needs nothing but itself.
        results_file: the same as JSON; runs.csv and curves.csv lie beside it.
    """

    analysis: Analysis
    report: Path
    results_file: Path


def compare(
    config: Comparison | str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | list[str] | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    on_run: Callable[[Progress], None] | None = None,
) -> ComparisonResult:
    """Compare fine-tuning methods: each at its own best learning rate, with several seeds, by paired statistics.

    First, with one seed, each method's rate is chosen on the validation data; a grid grows while its best rate is its first or
    last. Then the runs that count are made with the other seeds and examined by the tests. Each run is made in a process of its
    own, loads what it has saved, and is one folder under `output_dir`; what is there is not made again.

    Args:
        config: settings, or the YAML or TOML file that holds them.
        overrides: settings that win over the file's: `train.max_steps=10`.
        resume: go on with the comparison in `output_dir`; methods and seeds may have been added.
        overwrite: replace the comparison in `output_dir`.
        on_run: called after each run.

    Raises:
        InputError: settings, data or model that cannot be used, or an `output_dir` that holds another comparison.
        RunError: a run's process was ended from outside; what is done is kept.

    Example:
        >>> result = bonetune.compare("comparison.yaml")
        >>> print(*result.analysis.summary, sep="\n")
    """
    comparison = load_comparison(config, overrides)
    check_folder(comparison, resume=resume, overwrite=overwrite)
    with engine(comparison) as make:
        (_, planned), *_ = make([(plan_comparison, (comparison,), {})])  # the model is loaded elsewhere, and is gone then
        with claimed(comparison, planned.data, resume=resume, overwrite=overwrite):
            runs = make_runs(comparison, make=make, on_run=on_run, sizes=planned.sizes)
            analysis = _reported(runs, planned.notes)
    folder = Path(comparison.output_dir)
    return ComparisonResult(analysis, folder / REPORT_FILE, folder / RESULTS_FILE)


def _reported(runs: Runs, notes: Sequence[str]) -> Analysis:
    """Write the report; what it says is returned."""
    curves = {
        name: {seed: read_curve(folder_of(runs.comparison, outcome.trial)) for seed, outcome in made.items()}
        for name, made in runs.counting.items()
    }
    folder = Path(runs.comparison.output_dir)
    return write_report(folder, _question(runs, notes), runs.sweeps, runs.rates, runs.counting, curves)


def _question(runs: Runs, notes: Sequence[str]) -> Question:
    comparison = runs.comparison
    configs = {
        name: comparison.run(name, size.r, runs.rates.get(name, 1e-4), comparison.sweep_seed, Path())
        for name, size in runs.sizes.items()
    }
    return Question(
        title=comparison.title,
        methods={name: config.method_in_words for name, config in configs.items()},
        references=comparison.references,
        seeds=comparison.seeds,
        sweep_seed=comparison.sweep_seed,
        matched_to=runs.reference,
        rate_of={name: method.rate_of for name, method in comparison.methods.items() if method.rate_of is not None},
        description=comparison.description,
        facts=_facts(runs, _usual_run(comparison, runs.sizes)),
        settings=comparison.to_yaml(),
        command=f"bonetune compare {comparison.output_dir}/{SETTINGS_FILE} output_dir={comparison.output_dir}-again",
        notes=notes,
    )


def _facts(runs: Runs, config: RunConfig) -> list[tuple[str, str]]:
    """What a reader wants to know before the numbers: model, data, length of a run, tests."""
    comparison = runs.comparison
    epochs = f"{config.num_train_epochs:g} epoch{'s' * (config.num_train_epochs != 1)}"
    length = f"{config.max_steps} steps" if config.max_steps is not None else epochs
    examples = config.per_device_train_batch_size * config.gradient_accumulation_steps
    validation = comparison.validation
    facts = [
        ("model", Path(config.model_name_or_path).name),
        ("trained on", f"{', '.join(config.dataset_names)}, {config.dataset_split}"),
        ("a run", f"{length} of {examples} examples a device, in {config.dtype}"),
    ]
    if any(len(outcomes) > 1 for outcomes in runs.sweeps.values()):
        facts.append(("rates chosen by", f"{validation.tasks[0]} on {_rows_of(validation)}"))
    tests = [f"{test.called(task)} on {_rows_of(test)}" for test in comparison.tests for task in test.tasks]
    return [*facts, ("tests", "; ".join(tests))]


def _rows_of(examination: Examination) -> str:
    parts = (examination.data or "the protocol's own rows", examination.split)
    first = f"the first {examination.limit}" if examination.limit is not None else None
    return ", ".join(part for part in (*parts, first) if part)
