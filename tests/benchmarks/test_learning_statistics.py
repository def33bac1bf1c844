"""Differences of hand-made records; statistics against SciPy and against every resample there is."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from benchmarks.learning import SEEDS, STEPS, Run
from benchmarks.learning_statistics import (
    exact_difference,
    loss_difference,
    paired_outcomes,
    read_records,
    t_interval,
    two_level_bootstrap,
)
from bonetune.errors import InputError


@pytest.mark.parametrize("values", [(0.1, 0.3), (-0.02, 0.01, 0.03), (1.0, 2.0, 4.0, 8.0)])
def test_t_interval_is_that_of_scipys_paired_test(values):
    expected = stats.ttest_rel(np.array(values) + 5, np.full(len(values), 5.0)).confidence_interval(0.95)
    assert t_interval(values) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("values", [(0.1,), (0.2, 0.2, 0.2), (0.1, math.nan, 0.2)])
def test_there_is_no_t_interval_without_spread(values):
    assert t_interval(values) is None


def test_bootstrap_draws_as_an_enumeration_of_all_resamples_does():
    groups = [(np.array([1.0, 5.0]), np.array([1.0, 3.0])), (np.array([-2.0, 0.0, 4.0]), np.array([2.0, 1.0, 1.0]))]

    def ratios(values, weights):  # of each equally likely draw of a group's items
        draws = itertools.product(range(len(values)), repeat=len(values))
        return [sum(values[i] for i in draw) / sum(weights[i] for i in draw) for draw in draws]

    # the two places of a resample are drawn independently, each a group with equal odds, then its items
    place = {}
    for group in groups:
        outcomes = ratios(*group)
        for outcome in outcomes:
            place[outcome] = place.get(outcome, 0) + 1 / (len(groups) * len(outcomes))
    expected = {}
    for (a, p), (b, q) in itertools.product(place.items(), repeat=2):
        expected[round((a + b) / 2, 9)] = expected.get(round((a + b) / 2, 9), 0) + p * q

    drawn, counts = np.unique(np.round(two_level_bootstrap(groups, resamples=40_000), 9), return_counts=True)
    assert sum(expected.values()) == pytest.approx(1)
    assert set(drawn) <= set(expected)
    frequencies = dict(zip(drawn, counts / 40_000, strict=True))
    assert all(abs(frequencies.get(value, 0) - p) < 5 * math.sqrt(p / 40_000) for value, p in expected.items())


def test_bootstrap_is_the_same_each_time():
    groups = [(np.array([1.0, 2.0]), np.ones(2)), (np.array([0.0, 5.0]), np.ones(2))]
    assert np.array_equal(two_level_bootstrap(groups, resamples=50), two_level_bootstrap(groups, resamples=50))


def test_differences_of_known_records(records):
    runs = records.complete().study().counting
    loss, exact = (difference(runs["bone"], runs["lora"]) for difference in (loss_difference, exact_difference))
    assert loss.by_seed == pytest.approx({seed: (seed - 3) / 40 for seed in SEEDS})
    assert loss.mean == pytest.approx(-1 / 40)
    assert loss.mean == pytest.approx(np.mean([runs["bone"][seed].test_loss - runs["lora"][seed].test_loss for seed in SEEDS]))
    assert loss.interval == t_interval(list(loss.by_seed.values()))
    assert loss.bootstrap is not None
    assert loss.bootstrap[0] < loss.mean < loss.bootstrap[1]
    assert exact.by_seed == {1: 0.5, 2: 0.5, 3: 0.5}
    assert exact.interval is None
    assert paired_outcomes(runs["bone"], runs["lora"]) == ([True, False] * 3, [True, True] * 3)


def test_only_shared_seeds_are_compared(records):
    runs = records.complete().study().counting
    difference = loss_difference({1: runs["bone"][1], 2: runs["bone"][2]}, {2: runs["lora"][2], 3: runs["lora"][3]})
    assert difference.by_seed == pytest.approx({2: -1 / 40})
    assert difference.interval is None
    assert difference.bootstrap is None


def test_different_items_are_not_paired(records):
    records.complete()
    records.write(Run("bone", 2e-3, 2), items=[(20.0, 11, True), (40.0, 30, True)])
    runs = records.study().counting
    with pytest.raises(InputError, match=r"bone-lr0.002-seed2.json and lora-lr0.002-seed2.json .* different items"):
        loss_difference(runs["bone"], runs["lora"])


def test_runs_at_another_rate_do_not_count(records):
    records.complete()
    records.write(Run("lora", 1e-3, 1), items=[(1.0, 10, True), (1.0, 30, True)])
    study = records.study()
    assert study.counting["lora"][1].learning_rate == 2e-3
    assert "`lora-lr0.001-seed1.json` does not count: that rate is not the one chosen for `lora`." in study.remarks


def test_a_rate_that_diverged_is_never_chosen(records):
    records.complete()
    records.write(Run("lora", 1e-3, 0), training=[math.nan], validation=math.nan)
    assert records.study().rates["lora"] == 2e-3


@pytest.mark.parametrize("content", ["{", "[]", '{"method": "bone"}'])
def test_files_that_are_no_records_are_named(records, content):
    (records.folder / "other.json").write_text(content)
    with pytest.raises(InputError, match=r"other\.json is no record of a run"):
        read_records(records.folder)


def test_records_that_cannot_be_compared_are_named(records):
    records.write(Run("bone", 2e-3, 1))
    with pytest.raises(InputError, match=r"seed1\.json has no test items"):
        read_records(records.folder)
    records.write(Run("bone", 2e-3, 1), training=[1.0], items=[(20.0, 10, True)])
    with pytest.raises(InputError, match=rf"seed1\.json has 1 steps, not {STEPS}"):
        read_records(records.folder)
