from collections import Counter
from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from bonetune.data.interleaving import interleaved

sizes = st.lists(st.integers(1, 20), min_size=1, max_size=4)


def opened(sizes):
    return [lambda size=size: iter(range(size)) for size in sizes]


@given(sizes)
def test_without_weights_each_is_gone_through_once_in_its_order(sizes):
    found = list(interleaved(opened(sizes)))
    for number, size in enumerate(sizes):
        assert [item for stream, item in found if stream == number] == list(range(size))
    shortest = min(sizes) * len(sizes)
    assert [stream for stream, _ in found[:shortest]] == list(range(len(sizes))) * min(sizes)


@given(st.lists(st.tuples(st.integers(1, 20), st.floats(0.1, 10)), min_size=1, max_size=4))
def test_with_weights_each_has_its_share_at_every_moment(streams):
    sizes, weights = [size for size, _ in streams], [weight for _, weight in streams]
    found = list(interleaved(opened(sizes), weights))
    given = Counter()
    for total, (stream, item) in enumerate(found, 1):
        assert item == given[stream] % sizes[stream]
        given[stream] += 1
        assert all(abs(given[n] - total * weight / sum(weights)) < 1 + 1e-9 for n, weight in enumerate(weights))
    assert all(given[n] >= size for n, size in enumerate(sizes))
    assert list(interleaved(opened(sizes), weights)) == found


def test_nothing_is_read_before_it_is_asked_for():
    def endless():
        yield from iter(int, 1)

    assert len(list(islice(interleaved([endless, endless], [1, 3]), 100))) == 100
