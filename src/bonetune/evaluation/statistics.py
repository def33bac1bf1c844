"""How sure one can be of a score, and of the difference of two."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import numpy as np

Z_95 = 1.959963984540054
RESAMPLES = 10_000
# Values that differ by less than this part of their size differ by rounding.
_ALIKE = 1e-9
# Items with at most so many distinct values are drawn by how often each value comes.
_DISTINCT = 32

Name = TypeVar("Name")


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
    return _middle(_ratios(value[None], weight[None], resamples, np.random.default_rng(seed))[0])


def resampled(
    statistic: Callable[[np.ndarray], float], items: int, *, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of 95% of a statistic that is no mean: of the numbers of items drawn with replacement."""
    rng = np.random.default_rng(seed)
    return _middle(np.array([statistic(rng.integers(items, size=items)) for _ in range(resamples)]))


def crossed_bootstrap(
    values: np.ndarray, weights: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of 95% of the mean over groups of sum(values) / sum(weights): groups and items are both drawn.

    All groups are of the same items, so one draw of items serves them all: an item that is hard in one is hard in the others.
    It knows no more groups than there are, and is too narrow where few of them differ much.

    Args:
        values, weights: (groups, items), what each item adds and how much it counts. As many groups, and as many items, as
            there are are drawn with replacement, apart from each other.
        resamples: how often.
        seed: of the draws.
    """
    rng, groups = np.random.default_rng(seed), len(values)
    ratios = _ratios(values, weights, resamples, rng)
    drawn = rng.integers(groups, size=(groups, resamples))
    return _middle(np.take_along_axis(ratios, drawn, axis=0).mean(0))


def _middle(values: np.ndarray) -> tuple[float, float]:
    """Where 95% of the values lie."""
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def _ratios(values: np.ndarray, weights: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """(groups, resamples): sum(values) / sum(weights) of each group, for as many items as there are, drawn with replacement."""
    count = values.shape[1]
    distinct, often = np.unique(np.concatenate([values, weights]), axis=1, return_counts=True)
    if len(often) <= _DISTINCT:
        sums = distinct @ rng.multinomial(count, often / count, size=resamples).T
        return sums[: len(values)] / sums[len(values) :]
    found = np.empty((len(values), resamples))
    for start in range(0, resamples, 100):
        part = found[:, start : start + 100]
        drawn = rng.integers(count, size=(part.shape[1], count))
        part[:] = values[:, drawn].sum(-1) / weights[:, drawn].sum(-1)
    return found


def student_tail(t: float, freedom: int) -> float:
    """P(|T| > |t|) of Student's t with whole degrees of freedom: Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle, odd = math.atan2(abs(t), math.sqrt(freedom)), freedom % 2
    sine, cosine = math.sin(angle), math.cos(angle)
    total, term = 0.0, cosine**odd
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= (power + 1) / (power + 2) * cosine**2
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return max(0.0, 1.0 - inside)


@cache
def student_quantile(freedom: int, outside: float = 0.05) -> float:
    """The t with P(|T| > t) = `outside`, by bisection."""
    low, high = 0.0, 1.0
    while student_tail(high, freedom) > outside:
        high *= 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if student_tail(middle, freedom) > outside else (low, middle)
    return high


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's interval of 95% for the mean; None if a value is not finite or there is no spread to judge by."""
    error = _standard_error(values)
    if error is None:
        return None
    mean, half = float(np.mean(values)), student_quantile(len(values) - 1) * error
    return mean - half, mean + half


def t_test(differences: Sequence[float]) -> float | None:
    """Two-sided probability that differences like these come of a mean of 0 (Student's paired test); None as `t_interval`.

    Differences that are all 0 are as near to it as can be: 1.
    """
    if len(differences) > 1 and not any(differences):
        return 1.0
    error = _standard_error(differences)
    return None if error is None else student_tail(float(np.mean(differences)) / error, len(differences) - 1)


def _standard_error(values: Sequence[float]) -> float | None:
    """Of the mean; None if it cannot be told."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    size = max(map(abs, values))
    if max(values) - min(values) <= _ALIKE * size:
        return None
    # in units of their size: squares of tiny numbers are 0
    return size * float(np.std(np.asarray(values) / size, ddof=1)) / math.sqrt(len(values))


def holm(p_values: Mapping[Name, float]) -> dict[Name, float]:
    """Probabilities adjusted for their number by Holm's step-down rule (1979).

    The i-th smallest of m becomes max over j <= i of min(1, (m - j + 1) p_(j)). Rejecting those up to 5% holds the chance of
    any false rejection among them to 5%.
    """
    adjusted: dict[Name, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}
