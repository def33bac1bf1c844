import copy
import re

import numpy as np
import pytest
from safetensors import SafetensorError

from bonetune.data import EncodedSet, RowFormat, encode_rows
from bonetune.data.cache import cached_encode_rows, content_key
from bonetune.errors import InputError

ROWS = [
    {"prompt": "the lazy", "completion": " dog"},
    {"prompt": "one", "completion": " two"},
    {"prompt": "a" * 99, "completion": ""},
]
FORMAT = RowFormat("prompt-completion", ("prompt", "completion"))
SETTINGS = {"max_length": 9, "truncation": "drop"}


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "bonetune" / "tokens"


def mute(tokenizer, monkeypatch):
    """From here on, tokenizing is an error."""

    def refuse(*arguments, **settings):
        raise AssertionError("tokenized again")

    monkeypatch.setattr(type(tokenizer), "__call__", refuse)


def test_a_second_time_nothing_is_tokenized(folder, tokenizer, monkeypatch):
    expected = encode_rows(ROWS, FORMAT, tokenizer, **SETTINGS)
    assert expected[1].dropped == 1
    assert cached_encode_rows(ROWS, FORMAT, tokenizer, **SETTINGS) == expected
    mute(tokenizer, monkeypatch)
    assert cached_encode_rows(ROWS, FORMAT, tokenizer, **SETTINGS) == expected
    assert [file.suffix for file in folder.iterdir()] == [".safetensors"]


def test_a_damaged_file_is_made_again(folder, tokenizer, monkeypatch):
    expected = cached_encode_rows(ROWS, FORMAT, tokenizer, **SETTINGS)
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    for damaged in (b"", whole[:-3], whole[:-3] + b"\x00" + whole[-2:]):
        file.write_bytes(damaged)
        assert cached_encode_rows(ROWS, FORMAT, tokenizer, **SETTINGS) == expected
        assert EncodedSet.load(file)[0] == expected[0]
    mute(tokenizer, monkeypatch)
    assert cached_encode_rows(ROWS, FORMAT, tokenizer, **SETTINGS) == expected


def test_the_name_follows_from_everything_that_matters(tokenizer):
    template, special, vocabulary = (copy.deepcopy(tokenizer) for _ in range(3))
    template.chat_template += " "
    special.eos_token = "<bos>"
    vocabulary.add_tokens(["lazy"])
    names = [
        content_key(ROWS, FORMAT, tokenizer, SETTINGS),
        content_key(ROWS[:2], FORMAT, tokenizer, SETTINGS),
        content_key(ROWS[::-1], FORMAT, tokenizer, SETTINGS),
        content_key(ROWS, RowFormat("instruction", FORMAT.fields), tokenizer, SETTINGS),
        content_key(ROWS, RowFormat("instruction", FORMAT.fields, "{instruction}"), tokenizer, SETTINGS),
        *(content_key(ROWS, FORMAT, other, SETTINGS) for other in (template, special, vocabulary)),
        *(content_key(ROWS, FORMAT, tokenizer, SETTINGS | more) for more in ({"max_length": 8}, {"truncation": "left"})),
    ]
    assert len(set(names)) == len(names)


def test_the_middle_of_a_long_array_matters(folder, tokenizer):
    given, other = np.ones(5000, np.uint16), np.ones(5000, np.uint16)
    other[2500] = 2
    assert str(given) == str(other)
    row_format, settings = RowFormat("tokens", ("input_ids",)), {"max_length": 5000}
    kept = [cached_encode_rows([{"input_ids": ids}], row_format, tokenizer, **settings)[0] for ids in (given, other, given)]
    assert [examples[0].input_ids[2500] for examples in kept] == [1, 2, 1]
    assert len(list(folder.iterdir())) == 2


def test_the_name_follows_from_nothing_else(tokenizer):
    before = content_key(ROWS, FORMAT, tokenizer, SETTINGS)
    tokenizer(["a", "the lazy dog"], truncation=True, max_length=2, padding=True)
    assert content_key(copy.deepcopy(ROWS), FORMAT, copy.deepcopy(tokenizer), SETTINGS) == before


def test_a_tokenizer_that_cannot_be_written_down_is_not_cached(folder, tokenizer):
    class Slow:
        is_fast = False

        def __call__(self, *arguments, **settings):
            return tokenizer(*arguments, **settings)

        def __getattr__(self, name):
            return getattr(tokenizer, name)

    expected = encode_rows(ROWS, FORMAT, tokenizer, **SETTINGS)
    assert cached_encode_rows(ROWS, FORMAT, Slow(), **SETTINGS) == expected
    assert not folder.exists()


def test_a_folder_that_cannot_be_written_is_done_without(folder, tokenizer):
    folder.parent.parent.mkdir(exist_ok=True)
    folder.parent.write_text("")
    with pytest.warns(UserWarning, match=r"Tokens are not kept in .* \(cache_tokens: false does without\)"):
        kept = cached_encode_rows(ROWS, FORMAT, tokenizer, **SETTINGS)
    assert kept == encode_rows(ROWS, FORMAT, tokenizer, **SETTINGS)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error")])
def test_a_write_that_fails_leaves_nothing_and_is_done_without(folder, tokenizer, monkeypatch, error):
    def fail(examples, path, notes):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(EncodedSet, "save", fail)
    with pytest.warns(UserWarning, match="Tokens are not kept in .*" + re.escape(str(error))):
        kept = cached_encode_rows(ROWS, FORMAT, tokenizer, **SETTINGS)
    assert kept == encode_rows(ROWS, FORMAT, tokenizer, **SETTINGS)
    assert not list(folder.iterdir())


def test_what_is_refused_leaves_nothing(folder, tokenizer):
    with pytest.raises(InputError, match="longer than max_length"):
        cached_encode_rows(ROWS, FORMAT, tokenizer, max_length=9, truncation="error")
    assert not folder.exists() or not list(folder.iterdir())
