import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bonetune.data import Encoded, EncodedSet
from bonetune.data.examples import IGNORED
from bonetune.errors import InputError

tokens = st.lists(st.integers(0, 2**31 - 1), max_size=6)
labels = st.lists(st.one_of(st.just(IGNORED), st.integers(0, 2**31 - 1)), max_size=6)
examples = st.lists(st.builds(Encoded, tokens, labels, st.integers(0, 10**6)), max_size=6)


@given(examples)
def test_a_set_is_the_list_of_its_examples(listed):
    held = EncodedSet(listed)
    assert list(held) == [held[i] for i in range(-len(listed), 0)] == listed
    assert held.lengths.tolist() == [len(e.input_ids) for e in listed]
    assert held.labelled.tolist() == [len(e.labels) for e in listed]
    assert held.supervised.tolist() == [e.supervised for e in listed]
    assert held.rows.tolist() == [e.row for e in listed]
    assert held.ids_at(1).tolist() == [[*e.input_ids, -1, -1][1] if len(e.input_ids) > 1 else -1 for e in listed]
    assert held.last_labels().tolist() == [[IGNORED, *e.labels][-1] for e in listed]


@given(examples, examples)
def test_taking_and_joining(one, two):
    joined = EncodedSet.joined([EncodedSet(one), EncodedSet(two)])
    assert list(joined) == one + two
    order = list(range(0, len(joined), 2)) + list(range(1, len(joined), 2))
    assert list(joined.take(order)) == [joined[i] for i in order]
    assert list(joined[1:4]) == list(joined)[1:4]
    assert joined[1:4] == EncodedSet(list(joined)[1:4])


@given(examples)
def test_digests_are_equal_where_tokens_and_labels_are(listed):
    digests = EncodedSet(listed).digests()
    for a, first in zip(digests, listed, strict=True):
        for b, second in zip(digests, listed, strict=True):
            assert (a == b) == ((first.input_ids, first.labels) == (second.input_ids, second.labels))


@settings(max_examples=20)
@given(examples)
def test_saved_and_loaded_they_are_the_same(tmp_path_factory, listed):
    path = tmp_path_factory.mktemp("set") / "set.safetensors"
    EncodedSet(listed).save(path, {"note": "ü"})
    loaded, notes = EncodedSet.load(path)
    assert loaded == EncodedSet(listed)
    assert notes == {"note": "ü"}


def test_numbers_to_be_predicted_stay_what_they_are(tmp_path):
    held = EncodedSet([Encoded([1, 2], [0.1]), Encoded([3], [-2.0])])
    held.save(tmp_path / "set")
    assert [e.labels for e in EncodedSet.load(tmp_path / "set")[0]] == [[0.1], [-2.0]]


def test_any_damage_is_found(tmp_path):
    path = tmp_path / "set"
    EncodedSet([Encoded([1, 2, 3], [IGNORED, 2, 3], 1)]).save(path)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(InputError, match=r"holds no examples|is damaged"):
            EncodedSet.load(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(InputError, match="holds no examples"):
        EncodedSet.load(path)
    with pytest.raises(InputError, match="holds no examples"):
        EncodedSet.load(tmp_path / "missing")


def test_a_set_takes_some_bytes_a_token():
    held = EncodedSet(Encoded(list(range(100)), list(range(100)), 1) for _ in range(50))
    assert sum(array.nbytes for array in vars(held).values() if isinstance(array, np.ndarray)) < 10 * held.lengths.sum()
