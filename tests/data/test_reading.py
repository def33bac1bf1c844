import json

import pyarrow
import pyarrow.parquet
import pytest

from bonetune.data import read_rows
from bonetune.errors import InputError

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "ä\u2028", "completion": "d"}]


def test_jsonl_json_and_parquet_hold_the_same_rows(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS) + "\n\n", encoding="utf-8")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    for suffix in ("jsonl", "json", "parquet"):
        assert read_rows(str(tmp_path / f"rows.{suffix}")) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b"", "is empty"),
        ("rows.jsonl", b'{"a": 1}\n{"a": \n', "line 2: not JSON"),
        ("rows.jsonl", b"[1]\n", r"row 1: '\[1\]' is not an object"),
        ("rows.json", b'{"a": 1}', "holds one dict, not a list"),
        ("rows.jsonl", b"\xff\xfe", "is not UTF-8 text"),
        ("rows.parquet", b"PAR2", "is not a parquet file"),
        ("rows.txt", b"x", r"unknown suffix '.txt'"),
    ],
)
def test_an_unreadable_file_says_why(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_rows(str(tmp_path / name))


def test_what_is_not_there_says_so(tmp_path):
    with pytest.raises(InputError, match=r"missing\.jsonl does not exist"):
        read_rows(str(tmp_path / "missing.jsonl"))
    with pytest.raises(InputError, match="is a folder, not a file"):
        read_rows(str(tmp_path))


def test_a_hub_data_set_out_of_reach_is_one_clear_error():
    with pytest.raises(InputError, match="'nobody/nothing' is neither a local file nor to be had from the hub"):
        read_rows("nobody/nothing")
