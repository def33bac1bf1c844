import csv
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from bonetune.data import binidx, read_rows, stream_rows
from bonetune.data.reading import SUFFIXES
from bonetune.data.slices import Slice
from bonetune.errors import InputError

ROWS = [
    {"prompt": "a", "completion": "b"},
    {"prompt": 'ä\u2028, "x"', "completion": "d\r\ne"},
    {"prompt": "", "completion": "f"},
]


def write(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        content = ("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n").encode()
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


@pytest.mark.parametrize("suffix", [suffix for suffix in SUFFIXES if suffix not in binidx.SUFFIXES])
def test_every_kind_of_file_holds_the_same_rows(tmp_path, suffix):
    source = write(tmp_path / f"rows{suffix}", ROWS)
    assert read_rows(source) == list(stream_rows(source)) == ROWS


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b"", "is empty"),
        ("rows.jsonl", b'{"a": 1}\n{"a": \n', "line 2: not JSON"),
        ("rows.jsonl", b"[1]\n", r"row 1: '\[1\]' is not an object"),
        ("rows.json", b'{"a": 1}', "holds one dict, not a list"),
        ("rows.jsonl", b'{"a": "\xff"}', r"is not UTF-8 text \(byte 0xff\)"),
        ("rows.jsonl.gz", b"abc", "cannot be read: Not a gzipped file"),
        ("rows.csv", b"a,b\n", "is empty"),
        ("rows.csv", b"a,b\n1,2\n1,2,3\n", r"line 3: 3 cells under 2 names \(a, b\)"),
        ("rows.csv", b"a,a\n1,2\n", r"line 1: the columns' names \['a', 'a'\]"),
        ("rows.csv", b'a,b\n1,"2\n', "line 2: not CSV"),
        ("rows.parquet", b"PAR2", "is not a parquet file"),
        ("rows.txt", b"x", r"unknown suffix '.txt'"),
    ],
)
def test_an_unreadable_file_says_why(tmp_path, name, content, message, streamed):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(stream_rows(str(tmp_path / name))) if streamed else read_rows(str(tmp_path / name))


def test_what_is_not_there_says_so(tmp_path):
    with pytest.raises(InputError, match=r"missing\.jsonl does not exist"):
        read_rows(str(tmp_path / "missing.jsonl"))
    with pytest.raises(InputError, match="is a folder, not a file"):
        read_rows(str(tmp_path))


@pytest.mark.parametrize("read", [read_rows, lambda source: list(stream_rows(source))])
def test_a_hub_data_set_out_of_reach_is_one_clear_error(read):
    with pytest.raises(InputError, match="'nobody/nothing' is neither a local file nor to be had from the hub"):
        read("nobody/nothing")


SPLITS = [
    "train",
    "any[:2]",
    "train[1:]",
    "train[1:2]",
    "test[-2:]",
    "train[:-1]",
    "train[40%:]",
    "train[:50%]",
    "train[-40%:90%]",
]


@pytest.mark.parametrize("split", SPLITS)
def test_slices_are_those_of_the_datasets_library(tmp_path, split):
    import datasets

    rows = [{"n": n} for n in range(5)]
    name = split.partition("[")[0]
    instruction = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(rows)})
    expected = [row for part in instruction for row in rows[part.from_ : part.to]]
    source = write(tmp_path / "rows.jsonl", rows)
    assert read_rows(source, split) == expected
    if Slice.parse(split).needs_count:
        with pytest.raises(InputError, match="needs the number of rows, which a stream does not know"):
            next(stream_rows(source, split))
    else:
        assert list(stream_rows(source, split)) == expected


@pytest.mark.parametrize("split", ["train[", "train[5]", "train[%:]", "train[1:50%]", "", "train[1:2:3]", "a+b"])
def test_what_is_no_slice_is_refused(tmp_path, split):
    source = write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(InputError, match="is no split: write"):
        read_rows(source, split)


def test_an_empty_slice_says_so(tmp_path):
    source = write(tmp_path / "rows.jsonl", ROWS)
    for read in (read_rows, lambda *arguments: list(stream_rows(*arguments))):
        with pytest.raises(InputError, match=r"has no rows in 'train\[9:\]'"):
            read(source, "train[9:]")


@pytest.mark.parametrize(("suffix", "most"), [(".jsonl", 1), (".jsonl.gz", 1), (".csv", 1), (".parquet", 2)])
def test_a_stream_reads_no_further_than_it_is_asked(tmp_path, suffix, most):
    """The file is broken after its first rows, and they come all the same."""
    source = tmp_path / f"rows{suffix}"
    rows = [{"n": str(n), "text": f"{n}" * 50_000} for n in range(6)]
    write(source, rows)
    if suffix == ".parquet":
        content = bytearray(source.read_bytes())
        second = pyarrow.parquet.ParquetFile(source).metadata.row_group(1).column(0)
        content[second.dictionary_page_offset or second.data_page_offset] ^= 0xFF
        source.write_bytes(content)
    elif suffix == ".jsonl.gz":
        source.write_bytes(gzip.compress(gzip.decompress(source.read_bytes()) + b"{"))
    else:
        source.write_bytes(source.read_bytes() + (b'"' if suffix == ".csv" else b"{"))
    stream = stream_rows(str(source))
    assert [next(stream) for _ in range(most)] == rows[:most]
    with pytest.raises(InputError):
        list(stream)


@pytest.mark.parametrize("read", [read_rows, lambda source: list(stream_rows(source))])
def test_a_compressed_file_that_is_cut_off_or_damaged_says_so(tmp_path, read):
    whole = gzip.compress(b"".join(json.dumps({"n": n, "text": f"{n * 7919}"}).encode() + b"\n" for n in range(999)))
    damaged = bytearray(whole)
    damaged[len(whole) // 2 :] = bytes(len(whole) - len(whole) // 2)
    for content in (whole[: len(whole) // 2], bytes(damaged)):
        (tmp_path / "rows.jsonl.gz").write_bytes(content)
        with pytest.raises(InputError, match=r"rows\.jsonl\.gz is cut off or damaged|line \d+: not JSON"):
            read(str(tmp_path / "rows.jsonl.gz"))


def test_json_lines_in_a_json_file(tmp_path):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "rows.json").write_text(lines)
    assert read_rows(str(tmp_path / "rows.json")) == ROWS
    (tmp_path / "rows.json").write_text(lines + "{")
    with pytest.raises(InputError, match="line 4: not JSON"):
        read_rows(str(tmp_path / "rows.json"))
    (tmp_path / "rows.json").write_text("[\n" + lines)
    with pytest.raises(InputError, match="file: not JSON"):
        read_rows(str(tmp_path / "rows.json"))
