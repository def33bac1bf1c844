import math
from itertools import islice

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from hypothesis import given
from hypothesis import strategies as st

from bonetune.data import Encoded, EncodedSet
from bonetune.data.batches import BatchPlan, padded
from bonetune.data.examples import IGNORED
from bonetune.errors import InputError
from bonetune.training.loader import Shares, muted, shares, streaming_loader, training_loader

COLLATE = padded(0)


def made(count):
    """Examples of 2 to 12 tokens, of which the last ones are supervised; the row says which it is."""
    random = np.random.default_rng(0)
    examples = []
    for row in range(1, count + 1):
        length = int(random.integers(2, 13))
        kept = int(random.integers(1, length))
        ids = random.integers(5, 99, length).tolist()
        examples.append(Encoded(ids, [IGNORED] * (length - kept) + ids[length - kept :], row))
    return examples


EXAMPLES = EncodedSet(made(23))
LAYOUTS = [Shares(world, 0, accumulation) for world in (1, 2, 3) for accumulation in (1, 2, 4)]
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda s: f"{s.world} devices, {s.accumulation} forwards")


def ranks(layout):
    return [Shares(layout.world, rank, layout.accumulation) for rank in range(layout.world)]


def plan(batch_size=6):
    return BatchPlan(EXAMPLES.lengths, batch_size, seed=3, group_by_length=True)


def loader(shared, batch_size=6):
    return training_loader(EXAMPLES, EXAMPLES.supervised, plan(batch_size), shared, COLLATE)


def streamed(shared, examples=EXAMPLES, batch_size=6, window=12, grouped=True):
    def count(some):
        return some.supervised

    return streaming_loader(
        examples, count, batch_size=batch_size, window=window, seed=3, shared=shared, collate=COLLATE, group_by_length=grouped
    )


def steps(batches, accumulation):
    """What each step of one device is: the forwards' batches, `accumulation` at a time."""
    batches = list(batches)
    return [batches[start : start + accumulation] for start in range(0, len(batches), accumulation)]


def unpadded(batch):
    """The rows' ids and labels."""
    lengths = batch["attention_mask"].sum(1).tolist()
    return [(batch["input_ids"][i, :n].tolist(), batch["labels"][i, :n].tolist()) for i, n in enumerate(lengths)]


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40),
    world=st.integers(1, 5),
    accumulation=st.integers(1, 5),
    data=st.data(),
)
def test_every_example_of_a_step_is_in_one_forward_of_one_device(lengths, world, accumulation, data):
    step = np.asarray(data.draw(st.permutations(range(len(lengths)))))[: data.draw(st.integers(1, len(lengths)))]
    array = np.asarray(lengths)
    forwards = [Shares(world, rank, accumulation).of(step, array) for rank in range(world)]
    assert all(len(of_device) == accumulation for of_device in forwards)
    parts = [part for of_device in forwards for part in of_device]
    assert sorted(i for part in parts for i in part) == sorted(step.tolist())
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


@given(count=st.integers(1, 9), world=st.integers(1, 4), accumulation=st.integers(1, 4))
def test_a_forward_without_an_example_has_the_shortest_to_stand_in(count, world, accumulation):
    lengths, supervised = np.arange(20, 20 - count, -1), np.arange(1, count + 1)
    for rank in range(world):
        found = shares(np.arange(count), lengths, supervised, Shares(world, rank, accumulation))
        assert {share.stand_in for share in found} == {count - 1}
        assert {(share.supervised, share.tokens) for share in found} == {(supervised.sum(), lengths.sum())}


@each_layout
def test_a_step_learns_from_the_same_examples_on_any_number_of_devices(layout):
    devices = [steps(loader(shared), layout.accumulation) for shared in ranks(layout)]
    planned = plan().epoch(0)
    assert {len(of_device) for of_device in devices} == {len(planned)}
    for number, step in enumerate(planned):
        batches = [batch for of_device in devices for batch in of_device[number]]
        assert len(batches) == layout.world * layout.accumulation
        assert sorted(i for batch in batches for i in batch["examples"]) == sorted(step.tolist())
        assert {batch["supervised"] for batch in batches} == {EXAMPLES.supervised[step].sum()}
        assert {batch["tokens"] for batch in batches} == {EXAMPLES.lengths[step].sum()}
        assert sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches) == EXAMPLES.supervised[step].sum()
        for batch in batches:
            expected = [(EXAMPLES[i].input_ids, EXAMPLES[i].labels) for i in batch["examples"]]
            if not expected:
                shortest = EXAMPLES[int(step[np.argmin(EXAMPLES.lengths[step])])]
                expected = [(shortest.input_ids, [IGNORED] * len(shortest.input_ids))]
            assert unpadded(batch) == expected


def test_there_are_stand_ins_in_these_tests():
    assert [] in [batch["examples"] for batch in loader(Shares(3, 2, 4))]
    assert muted(EXAMPLES[0]).supervised == 0


def test_each_epoch_has_its_own_order_and_always_the_same():
    orders = []
    for epoch in (0, 1, 0):
        one = loader(Shares())
        one.set_epoch(epoch)
        orders.append([batch["examples"] for batch in one])
    assert orders[0] == orders[2] != orders[1]
    assert all(sorted(i for examples in order for i in examples) == list(range(23)) for order in orders)


@pytest.mark.parametrize("make", [loader, streamed])
@pytest.mark.parametrize("skipped", [1, 5, 7])
def test_going_on_is_passing_over_what_was_done(make, skipped):
    shared = Shares(2, 1, 2)
    whole, rest = (list(islice(batches, 40)) for batches in (make(shared), skip_first_batches(make(shared), skipped)))
    assert len(whole) > skipped
    for ours, expected in zip(rest[: len(whole) - skipped], whole[skipped:], strict=True):
        assert ours["examples"] == expected["examples"]
        assert torch.equal(ours["input_ids"], expected["input_ids"])


@pytest.mark.parametrize("make", [loader, streamed])
def test_dropout_s_random_numbers_are_left_alone(make):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(islice(make(Shares()), 10))
    assert torch.equal(torch.get_rng_state(), before)


@each_layout
@pytest.mark.parametrize("grouped", [True, False])
def test_a_stream_too_is_the_same_on_any_number_of_devices(layout, grouped):
    count = 9
    alone = [step[0]["examples"] for step in steps(islice(streamed(Shares(), grouped=grouped), count), 1)]
    taken = count * layout.accumulation
    devices = [steps(islice(streamed(shared, grouped=grouped), taken), layout.accumulation) for shared in ranks(layout)]
    for number, rows in enumerate(alone):
        batches = [batch for of_device in devices for batch in of_device[number]]
        assert sorted(row for batch in batches for row in batch["examples"]) == sorted(rows)
        assert {batch["supervised"] for batch in batches} == {int(EXAMPLES.supervised[np.asarray(rows) - 1].sum())}


@pytest.mark.parametrize("batch_size", [1, 4, 6, 40])
@pytest.mark.parametrize("window", [1, 7, 12, 100])
def test_a_stream_is_gone_through_again_and_again_and_nothing_is_left_out(batch_size, window):
    whole = max(window // batch_size, 1)
    batches = list(islice(streamed(Shares(), batch_size=batch_size, window=window), 7 * whole))
    assert {len(batch["examples"]) for batch in batches} == {batch_size}
    for number in range(7):  # each window is what comes next
        rows = [row for batch in batches[number * whole : (number + 1) * whole] for row in batch["examples"]]
        start = number * whole * batch_size
        assert sorted(rows) == sorted(1 + place % len(EXAMPLES) for place in range(start, start + whole * batch_size))


def test_a_window_is_what_is_shuffled():
    first = [row for batch in islice(streamed(Shares(), window=12), 2) for row in batch["examples"]]
    assert sorted(first) == list(range(1, 13)) != first


@pytest.mark.parametrize("stream", [[], iter(list(EXAMPLES))])
def test_a_stream_that_has_nothing_more_is_an_error(stream):
    with pytest.raises(InputError, match="does not begin again"):
        list(islice(streamed(Shares(), examples=stream), 100))


def test_a_stand_in_for_a_regression_learns_no_number():
    (label,) = muted(Encoded([5, 6], [-100.0])).labels
    assert math.isnan(label)
    assert muted(Encoded([5, 6], [1])).labels == [IGNORED]
