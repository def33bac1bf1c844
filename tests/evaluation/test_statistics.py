import pytest
from scipy import stats

from bonetune.evaluation import Proportion, most_frequent, sign_test


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
