import itertools
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bonetune.data import binidx_rows, read_rows, stream_rows, write_binidx
from bonetune.data.binidx import files_of, is_binidx
from bonetune.errors import InputError

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}
DOCUMENTS = [[5, 6, 0], [7, 0], [8, 9, 10, 0]]
CONTENT = struct.pack("<9H", *itertools.chain(*DOCUMENTS))


def index_bytes(lengths, places, documents, code=8, version=1, magic=b"MMIDIDX\x00\x00", numbers=None):
    """An index as Megatron's `_IndexWriter` lays it out."""
    numbers = numbers or (len(lengths), len(documents))
    head = magic + struct.pack("<Q", version) + struct.pack("<B", code) + struct.pack("<QQ", *numbers)
    return head + struct.pack(f"<{len(lengths)}i{len(places)}q{len(documents)}q", *lengths, *places, *documents)


def put(folder, index, content=CONTENT):
    (folder / "x.idx").write_bytes(index)
    (folder / "x.bin").write_bytes(content)
    return folder / "x"


def ids_of(path):
    return [row["input_ids"].tolist() for row in binidx_rows(path)]


@st.composite
def documents_of_a_type(draw):
    name = draw(st.sampled_from(sorted(CODES)))
    limits = np.iinfo(name)
    ids = st.integers(int(limits.min), int(limits.max))
    return name, draw(st.lists(st.lists(ids, max_size=9), min_size=1, max_size=9).filter(any))


@given(documents_of_a_type())
def test_what_is_written_is_read_and_laid_out_as_megatron_does(tmp_path_factory, written):
    name, documents = written
    prefix = tmp_path_factory.mktemp("tokens") / "v1.5"
    assert write_binidx(prefix, iter(documents), name) == (len(documents), sum(map(len, documents)))
    assert ids_of(prefix) == ids_of(f"{prefix}.bin") == ids_of(f"{prefix}.idx") == documents
    size = np.dtype(name).itemsize
    starts = [size * end for end in itertools.accumulate(map(len, documents), initial=0)]
    expected = index_bytes([*map(len, documents)], starts[:-1], range(len(documents) + 1), CODES[name])
    assert (prefix.parent / "v1.5.idx").read_bytes() == expected
    content = (prefix.parent / "v1.5.bin").read_bytes()
    assert content == b"".join(token.to_bytes(size, "little", signed="u" not in name) for d in documents for token in d)
    assert len(list(prefix.parent.iterdir())) == 2


@given(st.data())
def test_a_damaged_index_is_an_input_error_or_tells_of_what_is_there(tmp_path_factory, data):
    whole = bytearray(index_bytes([3, 2, 4], [0, 6, 10], [0, 1, 2, 3]))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(whole) - 1))
        whole[place] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        whole = whole[: data.draw(st.integers(0, len(whole)))]
    prefix = put(tmp_path_factory.mktemp("damaged"), bytes(whole))
    try:
        rows = list(binidx_rows(prefix))
    except InputError as error:
        assert "x.idx" in str(error)  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert all(row["input_ids"].base is not None and len(row["input_ids"].tolist()) <= 18 for row in rows)


@given(st.binary(max_size=80))
def test_bytes_of_no_index_are_an_input_error(tmp_path_factory, content):
    with pytest.raises(InputError, match=r"x\.idx"):
        ids_of(put(tmp_path_factory.mktemp("none"), content))


HUGE = 2**63 - 2


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"", "does not begin with"),
        (index_bytes([3], [0], [0, 1], magic=b"TNTIDX\x00\x00\x00"), "does not begin with"),
        (index_bytes([3], [0], [0, 1])[:33], "is cut off in its first 34 bytes"),
        (index_bytes([3], [0], [0, 1], version=2), "is of version 2: only 1 is known"),
        (index_bytes([3], [0], [0, 1], code=6), "has ids of type 6, which are no integers that are known: 1 .uint8"),
        (index_bytes([3], [0], [0, 1], code=77), "has ids of type 77"),
        (index_bytes([3], [0], [0, 1])[:-1], "has 61 bytes, and 1 sequences in 1 documents take 62: it is cut off"),
        (index_bytes([3], [0], [0, 1]) + b"xy", "has 64 bytes"),
        (index_bytes([3], [0], [0, 1], numbers=(2**64 - 1, 2**64 - 1)), "has 62 bytes, and 18446744073709551615 seq"),
        (index_bytes([3, 7], [0, 6], [0, 1, 2]), "sequence 2, 7 ids of 2 bytes at byte 6, does not lie in the 18 bytes"),
        (index_bytes([3, -1], [0, 6], [0, 1, 2]), "sequence 2, -1 ids"),
        (index_bytes([3, 1], [0, -2], [0, 1, 2]), "at byte -2, does not lie in"),
        (index_bytes([3, 2**31 - 1], [0, HUGE], [0, 1, 2]), "does not lie in"),
        (index_bytes([3, 1], [0, HUGE], [0, 1, 2], code=5), "sequence 1, 3 ids of 8 bytes at byte 0, does not lie"),
        (index_bytes([3, 1], [0, 7], [0, 1, 2]), "sequence 2, 1 ids of 2 bytes at byte 7, is askew"),
        (index_bytes([3, 2], [0, 6], [0, 1, 3]), "documents that do not go from 0 to 2 in order"),
        (index_bytes([3, 2], [0, 6], [1, 2, 2]), "documents that do not"),
        (index_bytes([3, 2], [0, 6], [0, 2, 1, 2]), "documents that do not"),
        (index_bytes([3, 2], [0, 6], []), "documents that do not"),
    ],
)
def test_an_index_that_cannot_be_read_says_why(tmp_path, index, message):
    with pytest.raises(InputError, match=message):
        ids_of(put(tmp_path, index))


@pytest.mark.parametrize("gone", ["x.bin", "x.idx"])
@pytest.mark.parametrize("named", ["x.bin", "x.idx"])
def test_one_file_without_the_other(tmp_path, gone, named):
    put(tmp_path, index_bytes([3], [0], [0, 1]))
    (tmp_path / gone).unlink()
    for read in (read_rows, lambda source: next(stream_rows(source)), lambda source: next(binidx_rows(source))):
        with pytest.raises(InputError, match=rf"{gone} does not exist: it belongs beside x"):
            read(str(tmp_path / named))


def test_sequences_may_share_ids_and_documents_have_several_of_them(tmp_path):
    assert ids_of(put(tmp_path, index_bytes([3, 5, 0], [0, 0, 18], [0, 2, 2, 3]))) == [[5, 6, 0], [5, 6, 0, 7, 0], []]
    with_modes = index_bytes([3, 2], [0, 6], [0, 1, 2]) + b"\x00\x01"
    assert ids_of(put(tmp_path, with_modes)) == DOCUMENTS[:2]
    assert ids_of(put(tmp_path, index_bytes([0], [0], [0, 1]), b"")) == [[]]


def test_rows_are_views_of_the_file(tmp_path):
    prefix = put(tmp_path, index_bytes([3, 2, 4], [0, 6, 10], [0, 1, 2, 3]))
    first, *_, last = binidx_rows(prefix)
    assert not last["input_ids"].flags.owndata
    assert not last["input_ids"].flags.writeable
    assert isinstance(first["input_ids"].base.base, np.memmap)


@pytest.mark.parametrize("name", ["x", "x.bin", "x.idx"])
def test_they_are_data_like_any_other(tmp_path, name):
    write_binidx(tmp_path / "x", DOCUMENTS)
    source = str(tmp_path / name)
    for rows in (read_rows(source), list(stream_rows(source))):
        assert [row["input_ids"].tolist() for row in rows] == DOCUMENTS
    assert [row["input_ids"].tolist() for row in read_rows(source, "train[-1:]")] == DOCUMENTS[-1:]


def test_a_name_without_suffix_is_theirs_where_nothing_else_is(tmp_path):
    write_binidx(tmp_path / "x", DOCUMENTS)
    assert is_binidx(tmp_path / "x")
    assert not is_binidx(tmp_path / "y")
    (tmp_path / "x").mkdir()
    assert not is_binidx(tmp_path / "x")
    with pytest.raises(InputError, match="is a folder, not a file"):
        read_rows(str(tmp_path / "x"))


def test_an_index_of_nothing_is_an_empty_data_set(tmp_path):
    prefix = put(tmp_path, index_bytes([], [], [0]))
    with pytest.raises(InputError, match="is empty: it needs at least one row"):
        read_rows(str(prefix))


@pytest.mark.parametrize(
    ("documents", "dtype", "message"),
    [
        ([], "uint16", "There is no token to write"),
        ([[], []], "uint16", "There is no token to write"),
        ([[1], [2, 65536]], "uint16", r"Document 2 has the id 65536, which uint16 does not hold \(0 to 65535\)"),
        ([[-1]], "uint16", "Document 1 has the id -1"),
        ([[2**63]], "int32", "Document 1 has the id 9223372036854775808"),
        ([[1.5]], "uint16", r"Document 1 is no list of token ids: \[1.5\]"),
        ([[10**30]], "int64", "Document 1 is no list of token ids"),
        ([[True]], "uint16", "no list of token ids"),
        ([[[1, 2]]], "uint16", "no list of token ids"),
        ([[[1, 2], [3]]], "uint16", "no list of token ids"),
        (["text"], "uint16", "no list of token ids: 'text'"),
        ([7], "uint16", "Document 1 is no list of token ids: 7"),
        ([[1]], "float32", "Token files cannot hold ids as float32: choose from uint8, int8, int16, int32, int64, uint16"),
        ([[1]], "uint32", "cannot hold ids as uint32"),
    ],
)
def test_what_cannot_be_written_leaves_what_was_there(tmp_path, documents, dtype, message):
    write_binidx(tmp_path / "x", DOCUMENTS)
    for name in ("x", "new"):
        with pytest.raises(InputError, match=message):
            write_binidx(tmp_path / name, documents, dtype)
    assert ids_of(tmp_path / "x") == DOCUMENTS
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.bin", "x.idx"]


def test_documents_are_taken_one_by_one_and_the_index_comes_last(tmp_path):
    index, content = files_of(tmp_path / "x")

    def documents():
        for number in range(3):
            assert not index.exists()
            assert not content.exists()
            yield np.arange(number, number + 2)

    assert write_binidx(tmp_path / "x", documents()) == (3, 6)
    assert ids_of(content) == [[0, 1], [1, 2], [2, 3]]


def test_ids_are_in_their_place_before_the_index_is(tmp_path, monkeypatch):
    moved = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, target: (moved.append(target.name), replace(self, target))[1])
    write_binidx(tmp_path / "x", DOCUMENTS)
    assert moved == ["x.bin", "x.idx"]
