"""`bonetune.tokenize`: the files hold what training makes of the rows."""

import json
import shutil

import numpy as np
import pytest

import bonetune
from bonetune.data import RowFormat, binidx_rows, encode_rows, prepare
from bonetune.errors import InputError, RunError
from bonetune.tokenization import Tokenized

TEXTS = [{"text": "the quick brown fox"}, {"text": " "}, {"text": "over the lazy dog<|im_end|>"}]
PAIRS = [{"prompt": "one plus two is", "completion": " three"}, {"prompt": "a", "completion": ""}]
CHATS = [{"messages": [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "two"}]}]
ASKED = [{"q": "one?", "a": "two"}]


@pytest.fixture
def write(tmp_path):
    def write(rows):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / "rows.jsonl")

    return write


@pytest.mark.parametrize(
    ("rows", "told"),
    [(TEXTS, {}), (PAIRS, {}), (CHATS, {}), (ASKED, {"dataset_field": ["q", "a"], "prompt_template": "{instruction}:"})],
)
def test_the_files_hold_what_training_makes_of_the_rows(write, tmp_path, model_folder, tokenizer, rows, told):
    template = {"template": told["prompt_template"]} if told else {}
    examples, _ = encode_rows(rows, RowFormat.detect(rows[0], told.get("dataset_field"), **template), tokenizer, 64)
    made = bonetune.tokenize(write(rows), str(tmp_path / "out.bin"), model=str(model_folder), **told)
    found = [row["input_ids"].tolist() for row in binidx_rows(tmp_path / "out")]
    assert found == [example.input_ids for example in examples]
    assert all(ids[-1] == tokenizer.eos_token_id for ids in found)
    assert made == Tokenized(str(tmp_path / "out"), len(found), sum(map(len, found)), len(rows) - len(found), "uint16")


def test_training_on_them_is_training_on_the_text(write, tmp_path, model_folder, tokenizer):
    data = write(TEXTS)
    bonetune.tokenize(data, str(tmp_path / "out"), model=str(model_folder))
    texts, ids = (prepare(tokenizer, dataset_name=name, cache_tokens=False).train for name in (data, str(tmp_path / "out")))
    assert [(e.input_ids, e.labels) for e in ids] == [(e.input_ids, e.labels) for e in texts]


def test_a_slice_another_end_and_files_that_are_there(write, tmp_path, model_folder, tokenizer):
    data, out = write(TEXTS), str(tmp_path / "out")
    bonetune.tokenize(data, out, model=str(model_folder))
    before = (tmp_path / "out.bin").read_bytes()
    told = {"model": str(model_folder), "dataset_split": "train[2:]", "eos_token": "<bos>"}
    for left in ("out.bin", "out.idx"):
        with pytest.raises(InputError, match=rf"{left}.* already there: choose another output, or pass --overwrite"):
            bonetune.tokenize(data, out, **told)
    assert (tmp_path / "out.bin").read_bytes() == before
    bonetune.tokenize(data, out, overwrite=True, **told)
    (row,) = binidx_rows(out)
    assert row["input_ids"].tolist() == [*tokenizer(TEXTS[2]["text"]).input_ids, tokenizer.bos_token_id]


def test_a_large_vocabulary_takes_four_bytes(write, tmp_path, tokenizer):
    tokenizer.add_tokens([f"<{number}>" for number in range(1 << 16)])
    tokenizer.save_pretrained(tmp_path / "large")
    shutil.copy(write([{"text": "a<65535>"}]), tmp_path / "large.jsonl")
    assert (
        bonetune.tokenize(str(tmp_path / "large.jsonl"), str(tmp_path / "out"), model=str(tmp_path / "large")).dtype == "int32"
    )
    (row,) = binidx_rows(tmp_path / "out")
    assert row["input_ids"].dtype == np.dtype("<i4")
    assert row["input_ids"][1] == len(tokenizer) - 1


@pytest.mark.parametrize(
    ("rows", "told", "message"),
    [
        (TEXTS[1:2], {}, "There is no token to write"),
        ([], {}, r"rows\.jsonl is empty"),
        ([{"text": "a"}, {"text": 3}], {}, r"rows\.jsonl: Row 2, field 'text': 3 is not text"),
        ([{"body": "a"}], {}, r"rows\.jsonl: Rows with the fields body fit no known format"),
        ([{"input_ids": [5, 999]}], {}, r"rows\.jsonl: Row 1: 999 is no id"),
        (TEXTS, {"dataset_format": "classification"}, "classification with task_type CAUSAL_LM"),
        (TEXTS, {"eos_token": "nothing"}, "eos_token 'nothing' is no token"),
        (TEXTS, {"model": "./nowhere"}, "does not exist"),
    ],
)
def test_wrong_input_leaves_nothing(write, tmp_path, model_folder, rows, told, message):
    with pytest.raises(InputError, match=message):
        bonetune.tokenize(write(rows), str(tmp_path / "out"), **({"model": str(model_folder)} | told))
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_full_disk_is_a_run_error(write, tmp_path, model_folder, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bonetune.tokenization.write_binidx", fail)
    with pytest.raises(RunError, match=r"out\.bin could not be written \(No space left on device\): make room"):
        bonetune.tokenize(write(TEXTS), str(tmp_path / "out"), model=str(model_folder))
