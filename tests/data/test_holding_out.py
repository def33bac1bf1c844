import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bonetune.data import Encoded, EncodedSet
from bonetune.data.holding_out import hold_out
from bonetune.errors import InputError

# rows as the contents of their pieces; few different contents, so that there are copies
rows = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=2), min_size=2, max_size=12)


def examples_of(contents):
    """Two data sets of `contents`' rows, by turns, with row numbers of their own."""
    listed = [(n % 2, Encoded([content], [content], n // 2 + 1)) for n, pieces in enumerate(contents) for content in pieces]
    listed.sort(key=lambda pair: pair[0])
    return EncodedSet(example for _, example in listed), np.asarray([source for source, _ in listed])


@given(rows, st.floats(0.01, 0.99), st.integers(0, 9))
def test_rows_are_whole_and_nothing_held_out_is_trained_on(contents, share, seed):
    examples, sources = examples_of(contents)
    where = [(int(source), int(row)) for source, row in zip(sources, examples.rows, strict=True)]
    text = {row: tuple(e.input_ids[0] for e, at in zip(examples, where, strict=True) if at == row) for row in where}
    count = round(share * len(contents))
    try:
        kept, chosen, copies = hold_out(examples, sources, share, seed)
    except InputError:
        assert count in (0, len(contents)) or len(set(text.values())) <= count
        return
    trained, held_out = {where[i] for i in kept}, {where[i] for i in chosen}
    assert len(held_out) == count
    assert all(sum(where[i] == row for i in chosen) == len(text[row]) for row in held_out)
    assert not {text[row] for row in trained} & {text[row] for row in held_out}
    left_out = set(where) - trained - held_out
    assert len(left_out) == copies
    assert {text[row] for row in left_out} <= {text[row] for row in held_out}
    again = hold_out(examples, sources, share, seed)
    assert (again[0].tolist(), again[1].tolist()) == (kept.tolist(), chosen.tolist())


def test_a_number_and_a_share_and_the_seed():
    examples, sources = examples_of([[n] for n in range(40)])
    (_, ten, _), (_, quarter, _), (_, other, _) = (hold_out(examples, sources, *a) for a in ((10, 0), (0.25, 0), (10, 1)))
    assert ten.tolist() == quarter.tolist() != other.tolist()


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (1.5, "eval_size=1.5 is neither a share below 1 nor a whole number"),
        (4, "holds out 4 of 4 rows"),
        (0.1, "holds out 0 of 4 rows"),
        (2, "every row equals one of those held out"),
    ],
)
def test_sizes_that_leave_nothing(size, message):
    examples, sources = examples_of([[1]] * 4)
    with pytest.raises(InputError, match=message):
        hold_out(examples, sources, size, 0)
