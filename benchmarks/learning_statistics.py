"""The runs of `benchmarks.learning`: which count, and what their paired differences can say.

What three seeds can say. The items of a run share one trained model, so what repeats is the seed: the main interval of a
difference is Student's t over the seeds' paired differences, with 2 degrees of freedom for three seeds. It is wide, and right
for new seeds with new problems if these differences are roughly normal. The two-level bootstrap (seeds, then items) knows no
more seeds than there are and is too narrow where seeds differ; McNemar's test and Wilson's interval take the trained models as
given and speak of new items only. No interval covers the choice of the learning rate, made on one seed, or allows for the
number of comparisons.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy import stats

from benchmarks.learning import METHODS, SEEDS, STEPS, SWEEP_SEED
from bonetune.errors import InputError

RESAMPLES, BOOTSTRAP_SEED = 10_000, 0


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

    @property
    def seeds(self) -> list[int]:
        """Those that count: the ones planned and any other there is."""
        return sorted({*SEEDS, *(seed for runs in self.counting.values() for seed in runs)})

    @property
    def twins(self) -> dict[str, str]:
        """Methods that compute another's function but for rounding, with that other: their origin."""
        origins = {name: METHODS[name].same_function_as for name in self.methods if name in METHODS}
        return {name: origin for name, origin in origins.items() if origin}

    def parameters(self, name: str) -> int | None:
        """What a method trains; none if it has no run."""
        return next((run.parameters for run in (*self.counting[name].values(), *self.sweep[name].values())), None)

    def comparable(self, reference: str) -> list[str]:
        """The other methods that share a seed with the reference."""
        others = [name for name in self.methods if name != reference]
        return [name for name in others if self.counting[name].keys() & self.counting[reference].keys()]

    def diverged_seeds(self, name: str) -> list[int]:
        return [seed for seed, record in self.counting[name].items() if record.diverged]


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
        ended = [record for record in study.sweep[study.twins.get(name, name)].values() if not record.diverged]
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
            where = f"{rate_text(record.learning_rate)}, seed {record.seed}"
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


def rate_text(rate: float) -> str:
    """A learning rate as people write it: 2e-3."""
    mantissa, exponent = f"{rate:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


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


def _missing(study: Study, name: str) -> list[str]:
    sentences = []
    swept = study.sweep[name]
    if not swept and name not in study.twins:
        sentences.append(f"`{name}` has no sweep.")
    elif swept and study.rates.get(name) in (None, min(swept), max(swept)):
        sentences.append(f"The sweep of `{name}` is not finished: its best rate does not lie inside its grid.")
    lacking = [str(seed) for seed in study.seeds if seed not in study.counting[name]]
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
