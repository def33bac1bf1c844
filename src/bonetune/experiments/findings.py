"""What a comparison found, as JSON can hold it."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from bonetune.evaluation.statistics import t_interval

BETTER, WORSE, NONE_FOUND = "better", "worse", "no difference found"
TOO_FEW, BROKEN, NO_SPREAD = "too few seeds to tell", "a run diverged", "no spread to judge by"
FORGETTING = "forgetting"

Interval = tuple[float, float]
Kind = Literal["share", "loss", "rise", "number"]


@dataclass(frozen=True)
class Question:
    """What a comparison asks.

    Args:
        title: of the report.
        methods: names, in order, with what each trains in a few words.
        references: methods that all others are compared with.
        seeds: of the runs that count.
        sweep_seed: of those that chose the rates.
        matched_to: the method whose trainable parameters the others match; None: none.
        rate_of: methods that take over the rate chosen for another one, with that other.
        description: what is compared on what, in a few sentences.
        facts: settings to show, as name and value.
        settings: all of them, as comparison.yaml has them.
        command: what makes the comparison again.
        notes: what was remarkable before the first run, a sentence each.
    """

    title: str
    methods: Mapping[str, str]
    references: Sequence[str]
    seeds: Sequence[int]
    sweep_seed: int
    matched_to: str | None = None
    rate_of: Mapping[str, str] = field(default_factory=dict)
    description: str = ""
    facts: Sequence[tuple[str, str]] = ()
    settings: str = ""
    command: str = ""
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Summary:
    """A number of each seed, their mean, and Student's interval of 95% over the seeds (None: too few, or no spread)."""

    by_seed: dict[int, float]
    mean: float
    interval: Interval | None

    @classmethod
    def of(cls, by_seed: Mapping[int, float]) -> "Summary | None":
        """None of no seed."""
        if not by_seed:
            return None
        values = list(by_seed.values())
        return cls(dict(by_seed), statistics.fmean(values), t_interval(values))


@dataclass(frozen=True)
class Spread:
    """The median over seeds, and the least and the greatest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        """None of no value."""
        return cls(statistics.median(values), min(values), max(values)) if values else None


@dataclass(frozen=True)
class Test:
    """What runs are measured by: a task, or forgetting.

    Args:
        name: the task's.
        protocol: how the score comes about, in words.
        higher_is_better: whether a larger score is a better one.
        kind: `share` of right items, `loss` or its `rise` in nats a token, or another `number`.
        items: how many are scored with a seed; None: forgetting does not say.
    """

    name: str
    protocol: str
    higher_is_better: bool
    kind: Kind
    items: int | None = None


@dataclass(frozen=True)
class Tried:
    """A run by which a learning rate was chosen: its validation score, or why there is none."""

    learning_rate: float
    validation: float | None
    failure: str | None


@dataclass(frozen=True)
class Kept:
    """The trained update times `scale`: the score of the first test, and forgetting (None: not measured)."""

    scale: float
    score: Summary
    forgetting: Summary | None


@dataclass(frozen=True)
class MethodResult:
    """A method's runs, summed up.

    Args:
        name: in the comparison.
        described: what it trains, in a few words.
        r: shard size or rank; None for full fine-tuning.
        trainable_parameters: of it; None without a run.
        learning_rate: the chosen one; None if there is none.
        rate_of: the method that its rate was chosen for, if it is another.
        sweep: the runs that chose the rate, by ascending rate.
        inside: whether rates below and above the chosen one were tried; None where nothing was swept.
        seeds: of the runs that count and came to a finite end.
        failures: why runs that count did not, by seed.
        scores: by test, forgetting among them.
        kept: the learning-forgetting curve, by scale.
        init_seconds, step_seconds, train_seconds: over the runs that count.
        peak_memory_bytes, saved_bytes: the most of them.
    """

    name: str
    described: str
    r: int | None
    trainable_parameters: int | None
    learning_rate: float | None
    rate_of: str | None
    sweep: list[Tried]
    inside: bool | None
    seeds: list[int]
    failures: dict[int, str]
    scores: dict[str, Summary]
    kept: list[Kept]
    init_seconds: Spread | None
    step_seconds: Spread | None
    train_seconds: Spread | None
    peak_memory_bytes: int | None
    saved_bytes: int | None

    @property
    def forgetting(self) -> Summary | None:
        """Rise of the loss on plain text, nats a token."""
        return self.scores.get(FORGETTING)


@dataclass(frozen=True)
class Difference:
    """A method less a reference, on the same items of the seeds that both have.

    Args:
        method, reference, test: of what.
        by_seed: the difference of each seed.
        mean: over the seeds, each counting alike.
        interval: Student's, of 95%, over the seeds: the one to rely on.
        bootstrap: seeds and items drawn with replacement; None where the items do not make the score, or for one seed.
        p: of the paired t-test over seeds; None where nothing is decided.
        adjusted_p: by Holm's rule over all pairs compared by this test.
        only_method, only_reference: items that one got right with more seeds than the other; None where the score is no share.
        mcnemar_p: of those two counts: whether these models differ, not whether the methods do.
        verdict: by the adjusted p at 5%, with three seeds at least, no run of either that diverged, and differences that are
            not all the same (but 0): else why nothing is decided.
    """

    method: str
    reference: str
    test: str
    by_seed: dict[int, float]
    mean: float
    interval: Interval | None
    bootstrap: Interval | None
    p: float | None
    adjusted_p: float | None
    only_method: int | None
    only_reference: int | None
    mcnemar_p: float | None
    verdict: str


@dataclass(frozen=True)
class Environment:
    """What the runs were made with: what all share, and what they do not: name, and how many runs have which value."""

    shared: dict[str, str]
    varying: dict[str, dict[str, int]]


@dataclass(frozen=True)
class Analysis:
    """Everything that the report says.

    Args:
        question: what was asked.
        validation_higher_is_better: of the scores that the rates were chosen by.
        tests: in order, forgetting last.
        methods: in order.
        differences: by test, reference and method.
        environment: of all runs.
        runs: how many there are, those that chose the rates included.
        remarks: what is missing or unusual, a sentence each.
        summary: what the runs show, a sentence each, the most important first. Names stand between backticks.
    """

    question: Question
    validation_higher_is_better: bool
    tests: list[Test]
    methods: list[MethodResult]
    differences: list[Difference]
    environment: Environment
    runs: int
    remarks: list[str]
    summary: list[str]

    def test(self, name: str) -> Test:
        """The test of that name."""
        return next(test for test in self.tests if test.name == name)

    def method(self, name: str) -> MethodResult:
        """The method of that name."""
        return next(method for method in self.methods if method.name == name)

    def against(self, reference: str, test: str) -> list[Difference]:
        """The differences to a reference by a test."""
        return [d for d in self.differences if (d.reference, d.test) == (reference, test)]

    def between(self, method: str, reference: str, test: str) -> Difference | None:
        """The difference of two methods by a test, if they share a seed."""
        return next((d for d in self.against(reference, test) if d.method == method), None)

    def to_json(self) -> dict[str, Any]:
        """As results.json holds it."""
        return asdict(self)
