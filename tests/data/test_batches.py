import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bonetune.data.batches import BatchPlan, packed, padded, share_out
from bonetune.data.examples import IGNORED, Encoded

LENGTHS = np.random.default_rng(0).integers(1, 500, 1003)


def flat(steps):
    return np.concatenate(steps)


@pytest.mark.parametrize("group_by_length", [False, True])
class TestPlan:
    def test_an_epoch_sees_each_example_once(self, group_by_length):
        plan = BatchPlan(LENGTHS, 8, seed=3, group_by_length=group_by_length)
        for epoch in range(3):
            steps = plan.epoch(epoch)
            assert sorted(flat(steps)) == list(range(len(LENGTHS)))
            assert [len(step) for step in steps] == [8] * 125 + [3]
            assert len(steps) == plan.steps

    def test_one_seed_one_order(self, group_by_length):
        def order(seed, epoch):
            return flat(BatchPlan(LENGTHS, 8, seed, group_by_length).epoch(epoch)).tolist()

        assert order(1, 0) == order(1, 0)
        assert order(1, 0) != order(1, 1)
        assert order(1, 0) != order(2, 0)


def test_batches_of_like_length_waste_little():
    def waste(plan):
        tokens = [(LENGTHS[step].max() * len(step), LENGTHS[step].sum()) for step in plan.epoch(0)]
        rows, useful = map(sum, zip(*tokens, strict=True))
        return 1 - useful / rows

    assert waste(BatchPlan(LENGTHS, 8, 0)) > 0.3
    assert waste(BatchPlan(LENGTHS, 8, 0, group_by_length=True)) < 0.05


def test_steps_of_one_window_come_in_no_order_of_length():
    steps = BatchPlan(LENGTHS, 8, 0, group_by_length=True).epoch(0)[:-1]
    means = np.array([LENGTHS[step].mean() for step in steps])
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3


class TestWeights:
    SOURCES = np.repeat([0, 1, 2], [900, 100, 3])

    def plan(self, weights):
        return BatchPlan(LENGTHS, 10, 0, sources=self.SOURCES, weights=weights)

    def test_shares_are_those_asked_for(self):
        counts = np.bincount(self.SOURCES[flat(self.plan((1, 2, 1)).epoch(0))])
        assert counts.sum() == len(LENGTHS)
        np.testing.assert_allclose(counts / len(LENGTHS), [0.25, 0.5, 0.25], atol=1e-3)

    def test_nothing_comes_again_before_all_came_once(self):
        plan = self.plan((1, 2, 1))
        seen = np.bincount(np.concatenate([flat(plan.epoch(epoch)) for epoch in range(5)]), minlength=len(LENGTHS))
        for source in range(3):
            of_source = seen[source == self.SOURCES]
            assert of_source.max() - of_source.min() <= 1

    def test_a_data_set_larger_than_its_share_gives_other_examples_in_the_next_epoch(self):
        plan = self.plan((1, 2, 1))
        first, second = (set(flat(plan.epoch(epoch))) & set(range(900)) for epoch in (0, 1))
        assert not first & second


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.integers(1, 9))
def test_sharing_out_is_fair(lengths, parts):
    lengths = np.array(lengths)
    dealt = share_out(range(len(lengths)), lengths, parts)
    assert sorted(i for part in dealt for i in part) == list(range(len(lengths)))
    sizes = [len(part) for part in dealt]
    assert max(sizes) - min(sizes) <= 1
    sums = [lengths[part].sum() for part in dealt]
    assert max(sums) - min(sums) <= lengths.max()


EXAMPLES = [Encoded([5, 6, 7], [IGNORED, 6, 7]), Encoded([8, 9], [8, 9]), Encoded([4], [4])]


def test_padding_is_masked_by_position():
    batch = padded(7)(EXAMPLES)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 7], [4, 7, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, 9, IGNORED], [4, IGNORED, IGNORED]]


@pytest.mark.parametrize(("labels", "dtype"), [([2, 0], torch.int64), ([0.5, 1.25], torch.float32)])
def test_classes_and_numbers_are_not_padded(labels, dtype):
    batch = padded(0, pad_labels=False)([Encoded([1] * n, [label]) for n, label in enumerate(labels, 1)])
    assert batch["labels"].tolist() == labels
    assert batch["labels"].dtype == dtype


def test_packing_lays_examples_end_to_end():
    batch = packed(EXAMPLES)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 4]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7, IGNORED, 9, IGNORED]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 5, 6]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_q"] == batch["max_length_k"] == 3


def test_padded_and_packed_supervise_the_same():
    rows, row = padded(0)(EXAMPLES)["labels"], packed(EXAMPLES)["labels"]
    assert (rows[:, 1:] != IGNORED).sum() == (row[:, 1:] != IGNORED).sum() == sum(e.supervised for e in EXAMPLES)


@given(st.lists(st.sampled_from([0.001, 0.1, 0.3, 1, 2, 7, 50]), min_size=1, max_size=6), st.integers(1, 40))
def test_shares_of_all_epochs_together_are_those_asked_for(weights, each):
    sources = np.repeat(range(len(weights)), each)
    plan = BatchPlan(np.ones(len(sources), int), 4, 0, sources=sources, weights=tuple(weights))
    given_out = np.zeros(len(weights))
    for epoch in range(8):
        members = flat(plan.epoch(epoch))
        assert len(members) == len(sources)
        given_out += np.bincount(sources[members], minlength=len(weights))
        exact = np.asarray(weights) / sum(weights) * len(sources) * (epoch + 1)
        assert (abs(given_out - exact) < len(weights)).all()


def test_a_data_set_of_small_weight_comes_in_its_time():
    sources = np.repeat([0, 1], [10, 3])
    plan = BatchPlan(np.ones(13, int), 4, 0, sources=sources, weights=(100, 1))
    epochs = [flat(plan.epoch(epoch)) for epoch in range(28)]
    assert (sources[epochs[0]] == 0).all()
    assert set(np.concatenate(epochs)) == set(range(13))
