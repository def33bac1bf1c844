"""How sure one can be of a score."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

Z_95 = 1.959963984540054


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
