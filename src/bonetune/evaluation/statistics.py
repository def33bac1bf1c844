"""How sure one can be of a score."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Z_95 = 1.959963984540054
RESAMPLES = 10_000


@dataclass(frozen=True)
class Proportion:
    """`correct` of `total`, with the Wilson score interval of 95%."""

    correct: int
    total: int

    @classmethod
    def of(cls, outcomes: Sequence[bool]) -> "Proportion":
        """The share of true outcomes."""
        return cls(sum(outcomes), len(outcomes))

    @property
    def value(self) -> float:
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """(p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n): Wilson, 1927."""
        n, p, z2 = self.total, self.value, Z_95**2
        centre, half = p + z2 / (2 * n), Z_95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
        return max(0.0, (centre - half) / (1 + z2 / n)), min(1.0, (centre + half) / (1 + z2 / n))

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"


def most_frequent(answers: Sequence[str]) -> tuple[str, Proportion]:
    """The commonest answer and its share: what a model scores that has learned nothing but the answers' frequencies."""
    answer, count = Counter(answers).most_common(1)[0]
    return answer, Proportion(count, len(answers))


def sign_test(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Two-sided exact probability that two paired outcomes differ this much by chance (McNemar's exact test)."""
    gained = sum(a and not b for b, a in zip(before, after, strict=True))
    lost = sum(b and not a for b, a in zip(before, after, strict=True))
    n, k = gained + lost, min(gained, lost)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def bootstrap(
    values: Sequence[float], weights: Sequence[float] | None = None, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of 95% of sum(values) / sum(weights), items drawn with replacement (Efron, 1979).

    Args:
        values: (items,), what each item adds.
        weights: (items,), how much it counts; None: 1 each, so that it is the mean's interval.
        resamples: how often items are drawn.
        seed: of the draws.
    """
    value = np.asarray(values, float)
    weight = np.ones(len(value)) if weights is None else np.asarray(weights, float)
    rng, ratios = np.random.default_rng(seed), []
    for _ in range(0, resamples, 100):
        drawn = rng.integers(len(value), size=(min(100, resamples), len(value)))
        ratios.append(value[drawn].sum(1) / weight[drawn].sum(1))
    low, high = np.quantile(np.concatenate(ratios), (0.025, 0.975))
    return float(low), float(high)


def two_level_bootstrap(
    groups: Sequence[tuple[np.ndarray, np.ndarray]], *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of 95% of the mean over groups of sum(values) / sum(weights): groups are drawn, then their items.

    It knows no more groups than there are, and is too narrow where few of them differ much.

    Args:
        groups: values and weights of each group's items, (items,) each. As many groups as there are are drawn with
            replacement, and of each drawn group as many items as it has, anew for each time that the group is drawn.
        resamples: how often.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    total = np.zeros(resamples)
    for _ in groups:
        drawn = rng.integers(len(groups), size=resamples)
        for index, (values, weights) in enumerate(groups):
            for here in np.array_split(np.flatnonzero(drawn == index), 1 + resamples // 100):
                items = rng.integers(len(values), size=(len(here), len(values)))
                total[here] += values[items].sum(1) / weights[items].sum(1)
    low, high = np.quantile(total / len(groups), (0.025, 0.975))
    return float(low), float(high)


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's interval of 95% for the mean; None if a value is not finite or there is no spread to judge by."""
    from scipy import stats

    n, mean = len(values), float(np.mean(values)) if len(values) else math.nan
    if n < 2 or not math.isfinite(mean) or min(values) == max(values):
        return None
    half = float(stats.t.ppf(0.975, n - 1)) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return mean - half, mean + half


def t_test(values: Sequence[float]) -> float | None:
    """Two-sided probability that differences like these come of a mean of 0 (Student's paired test); None as `t_interval`."""
    from scipy import stats

    if t_interval(values) is None:
        return None
    n = len(values)
    t = float(np.mean(values)) / (float(np.std(values, ddof=1)) / math.sqrt(n))
    return float(2 * stats.t.sf(abs(t), n - 1))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Probabilities adjusted for their number by Holm's step-down rule (1979): the share of false finds of any stays below 5%.

    The i-th smallest of m becomes max over j <= i of min(1, (m - j + 1) p_(j)).
    """
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}
