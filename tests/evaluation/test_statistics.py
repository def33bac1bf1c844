import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from bonetune.evaluation import Proportion, most_frequent, sign_test
from bonetune.evaluation.statistics import (
    bootstrap,
    crossed_bootstrap,
    holm,
    resampled,
    student_quantile,
    student_tail,
    t_interval,
    t_test,
)


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (3, 10), (10, 10), (1, 1), (412, 1319)])
def test_wilson_interval_is_scipys(correct, total):
    expected = stats.binomtest(correct, total).proportion_ci(0.95, method="wilson")
    assert Proportion(correct, total).interval == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_sign_test_is_scipys_binomial_test():
    before = [True] * 3 + [False] * 17
    after = [False] * 2 + [True] * 10 + [False] * 8
    gained, lost = 9, 2
    assert sign_test(before, after) == pytest.approx(stats.binomtest(lost, gained + lost, 0.5).pvalue)
    assert sign_test(before, before) == 1


def test_most_frequent_answer():
    assert most_frequent(["a", "b", "a"]) == ("a", Proportion(2, 3))


def test_a_proportion_reads_as_percent_with_its_interval():
    assert str(Proportion(1, 2)) == "50.0% [9.5, 90.5]"


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 10, 29, 200])
@pytest.mark.parametrize("t", [0, 0.1, 1, -2.5, 12, 300])
def test_students_tail_is_scipys(t, freedom):
    assert student_tail(t, freedom) == pytest.approx(2 * stats.t.sf(abs(t), freedom), rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("outside", [0.5, 0.05, 0.001])
@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 30, 501])
def test_students_quantile_is_scipys(freedom, outside):
    assert student_quantile(freedom, outside) == pytest.approx(stats.t.isf(outside / 2, freedom), rel=1e-9)


@given(st.lists(st.floats(-1e3, 1e3).map(lambda value: round(value, 6)), min_size=2, max_size=8))
def test_the_t_interval_and_test_are_scipys(values):
    interval, p = t_interval(values), t_test(values)
    if np.ptp(values) <= 1e-9 * np.max(np.abs(values)):
        assert interval is None
        assert p == (1 if not any(values) else None)
        return
    expected = stats.ttest_1samp(values, 0)
    assert interval == pytest.approx(tuple(expected.confidence_interval(0.95)), rel=1e-6, abs=1e-9)
    assert p == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("values", [[], [1.0], [0.5, 0.5, 0.5], [0.1 + 0.2, 0.3], [1.0, math.nan], [1.0, math.inf, 2.0]])
def test_what_has_no_spread_has_no_interval(values):
    assert t_interval(values) is None
    assert t_test(values) is None


def test_tiny_numbers_have_a_spread_too():
    assert t_test([0.0, 4e-243]) == pytest.approx(t_test([0.0, 4.0]))
    assert t_interval([1e-200, 3e-200]) == pytest.approx([1e-200 * end for end in t_interval([1.0, 3.0])])


def test_the_t_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    intervals = [t_interval(rng.normal(3, 2, size=3).tolist()) for _ in range(2000)]
    covered = sum(low <= 3 <= high for low, high in intervals)
    assert stats.binomtest(covered, 2000, 0.95).pvalue > 1e-3


@given(st.lists(st.floats(0, 1), max_size=7))
def test_holm_rejects_what_its_steps_do(p_values):
    adjusted = holm(dict(enumerate(p_values)))
    assert list(adjusted) == list(range(len(p_values)))
    for level in (0.01, 0.05, 0.3, *p_values):
        rejected, left = set(), set(range(len(p_values)))
        while left:  # Holm's own words: the smallest of those left against level / (their number)
            smallest = min(left, key=p_values.__getitem__)
            if p_values[smallest] * len(left) > level:
                break
            rejected.add(smallest)
            left.remove(smallest)
        assert {i for i, p in adjusted.items() if p <= level} == (rejected if level < 1 else set(range(len(p_values))))


def test_holm_bounds_any_false_rejection():
    rng = np.random.default_rng(1)
    false = sum(min(holm(dict(enumerate(rng.uniform(size=6)))).values()) <= 0.05 for _ in range(4000))
    assert stats.binomtest(false, 4000, 0.05, alternative="greater").pvalue > 1e-3


def test_the_bootstrap_is_scipys():
    values = np.random.default_rng(2).normal(size=40)
    expected = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(3))
    found = bootstrap(values.tolist(), resamples=20_000)
    assert found == pytest.approx(tuple(expected.confidence_interval), abs=0.02)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_crossed_bootstrap_is_that_of_all_draws(weighted):
    """Two groups of two items have few enough draws to go through all."""
    values, weights = np.array([[0.0, 1], [2, 5]]), np.array([[1.0, 3], [2, 1]]) if weighted else np.ones((2, 2))
    pairs = list(itertools.product(range(2), repeat=2))
    means = [
        np.mean([values[group][list(items)].sum() / weights[group][list(items)].sum() for group in groups])
        for groups, items in itertools.product(pairs, pairs)
    ]  # each draw is as likely as another
    low, high = np.quantile(means, (0.025, 0.975), method="inverted_cdf")
    assert crossed_bootstrap(values, weights) == pytest.approx((low, high))


def test_many_distinct_items_and_few_are_drawn_alike():
    rng = np.random.default_rng(4)
    few = (rng.uniform(size=(3, 200)) < np.array([[0.4], [0.5], [0.6]])) * 1.0
    many = few + rng.normal(0, 1e-9, few.shape)
    assert crossed_bootstrap(few, np.ones_like(few)) == pytest.approx(crossed_bootstrap(many, np.ones_like(few)), abs=0.01)
    assert crossed_bootstrap(many, np.ones_like(few)) == crossed_bootstrap(many, np.ones_like(few))


def test_the_crossed_bootstrap_sees_the_groups_spread():
    low, high = crossed_bootstrap(np.repeat([[-1.0], [0.0], [1.0]], 50, axis=1), np.ones((3, 50)))
    assert low < -0.5
    assert high > 0.5


def test_the_crossed_bootstrap_sees_items_that_are_hard_in_every_group():
    """Groups that agree on every item tell no more than one of them."""
    items = np.random.default_rng(5).normal(size=60)
    one = bootstrap(items.tolist())
    assert crossed_bootstrap(np.stack([items] * 4), np.ones((4, 60))) == pytest.approx(one, abs=0.03)


def test_a_statistic_of_drawn_items_is_scipys_bootstrap():
    rng = np.random.default_rng(3)
    a = rng.normal(size=60)
    b = a + rng.normal(size=60)
    low, high = resampled(lambda drawn: float(np.corrcoef(a[drawn], b[drawn])[0, 1]), 60, resamples=4000)
    theirs = stats.bootstrap(
        (a, b), lambda x, y: np.corrcoef(x, y)[0, 1], paired=True, vectorized=False, n_resamples=4000, method="percentile",
        rng=np.random.default_rng(5),
    ).confidence_interval  # fmt: skip
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.02)
