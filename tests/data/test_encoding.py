from itertools import pairwise

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from bonetune.data import Encoded, EncodedSet, RowFormat, encode_rows
from bonetune.data.batches import padded
from bonetune.data.encoding import CHUNK, encode_stream
from bonetune.data.examples import IGNORED
from bonetune.errors import InputError

FORMAT = RowFormat("prompt-completion", ("prompt", "completion"))
TEXT = RowFormat("text", ("text",))
TOKENS = RowFormat("tokens", ("input_ids",))
ROWS = [{"prompt": "what is one plus two?", "completion": " three."}, {"prompt": "the lazy", "completion": " dog"}]


class Bytewise:
    """A tokenizer of which everyone can compute the tokens."""

    eos_token, eos_token_id, bos_token_id = "\x00", 0, None

    def __call__(self, text, **settings):
        ids = list(text.encode()) if isinstance(text, str) else [list(one.encode()) for one in text]
        return type("Encoding", (), {"input_ids": ids})()


def test_the_answer_and_the_end_of_text_are_supervised_and_nothing_else(tokenizer):
    encoded, lengths = encode_rows(ROWS, FORMAT, tokenizer, max_length=64)
    for example, row in zip(encoded, ROWS, strict=True):
        prompt = tokenizer(row["prompt"]).input_ids
        assert example.input_ids[: len(prompt)] == prompt
        assert example.labels[: len(prompt)] == [IGNORED] * len(prompt)
        assert example.labels[len(prompt) :] == example.input_ids[len(prompt) :]
        assert tokenizer.decode(example.labels[len(prompt) :]) == row["completion"] + tokenizer.eos_token
        assert example.labels[-1] == tokenizer.eos_token_id
    assert lengths.examples == 2
    assert lengths.supervised == sum(e.supervised for e in encoded)


def test_prompts_are_learned_too_by_choice(tokenizer):
    masked, _ = encode_rows(ROWS, FORMAT, tokenizer, 64)
    encoded, lengths = encode_rows(ROWS, FORMAT, tokenizer, 64, completion_only_loss=False)
    for example, other in zip(encoded, masked, strict=True):
        assert example.input_ids == other.input_ids
        assert example.labels == [IGNORED, *example.input_ids[1:]]
    assert lengths.supervised == lengths.tokens - 2


def test_many_rows_at_once_are_each_row_by_itself(tokenizer):
    rows = [{"prompt": "the lazy dog " * (n % 7), "completion": f" {n}"} for n in range(CHUNK + 3)]
    encoded, _ = encode_rows(rows, FORMAT, tokenizer, 200)
    for n in (0, 5, CHUNK - 1, CHUNK, CHUNK + 2):
        (alone,), _ = encode_rows([rows[n]], FORMAT, tokenizer, 200)
        assert (encoded[n].input_ids, encoded[n].labels) == (alone.input_ids, alone.labels)
        assert encoded[n].row == n + 1
    assert list(encode_stream(iter(rows), FORMAT, tokenizer, 200)) == list(encoded)


def test_too_long_is_an_error_with_the_count_and_the_99th_percentile():
    rows = [{"prompt": "a" * n, "completion": "b"} for n in range(1, 101)]
    with pytest.raises(InputError, match=r"92 of 100 examples .* max_length=10 tokens \(99th percentile \d+, longest 102\)"):
        encode_rows(rows, FORMAT, Bytewise(), max_length=10)


def test_truncation_by_choice():
    rows = [{"prompt": "abcdef", "completion": "gh"}, {"prompt": "a", "completion": "b"}]
    whole = [*b"abcdefgh", 0]
    kept = {mode: encode_rows(rows, FORMAT, Bytewise(), 7, mode) for mode in ("drop", "left", "right")}
    assert [e.input_ids for e in kept["drop"][0]] == [[*b"ab", 0]]
    assert (kept["drop"][1].dropped, kept["drop"][1].truncated) == (1, 0)
    assert kept["left"][0][0].input_ids == whole[-7:]
    assert kept["right"][0][0] == Encoded(whole[:7], [IGNORED] * 6 + [*b"g"], 1)
    assert (kept["right"][1].dropped, kept["right"][1].truncated) == (0, 1)
    for mode in ("drop", "left", "right"):
        assert EncodedSet(encode_stream(rows, FORMAT, Bytewise(), 7, mode)) == kept[mode][0]


@pytest.mark.parametrize("size", range(1, 30))
@pytest.mark.parametrize("max_length", [2, 3, 7])
def test_split_text_is_predicted_token_by_token_once(size, max_length):
    text = bytes(range(65, 65 + size)).decode()
    encoded, lengths = encode_rows([{"text": text}], TEXT, Bytewise(), max_length, "split")
    assert all(len(e.input_ids) <= max_length and e.row == 1 for e in encoded)
    assert all(e.labels == [IGNORED, *e.input_ids[1:]] and e.supervised for e in encoded)
    assert all(one.input_ids[-1] == other.input_ids[0] for one, other in pairwise(encoded))
    assert [token for e in encoded for token in e.labels[1:]] == [*text.encode()[1:], 0]
    assert lengths.truncated == (size + 1 > max_length)


def test_given_ids_are_cut_and_split_as_text_is(tokenizer):
    rows = [{"text": "the lazy dog jumps over the quick brown fox"}, {"text": "a"}]
    given = [{"input_ids": e.input_ids} for e in encode_rows(rows, TEXT, tokenizer, 64)[0]]
    for mode in ("drop", "left", "right", "split"):
        assert encode_rows(given, TOKENS, tokenizer, 4, mode) == encode_rows(rows, TEXT, tokenizer, 4, mode)
        assert EncodedSet(encode_stream(given, TOKENS, tokenizer, 4, mode)) == encode_rows(given, TOKENS, tokenizer, 4, mode)[0]
    with pytest.raises(InputError, match="choose truncation: drop, left, right or split"):
        encode_rows(given, TOKENS, tokenizer, 4)


def test_ids_of_which_none_is_predicted_are_left_out_and_counted(tokenizer):
    rows = [{"input_ids": []}, {"input_ids": [5, 6]}, {"input_ids": np.asarray([1], np.uint16)}]
    (example,), lengths = encode_rows(rows, TOKENS, tokenizer, 5)
    assert (example.row, lengths.empty, lengths.examples) == (2, 2, 1)
    with pytest.raises(InputError, match="No row has two tokens or more"):
        encode_rows(rows[:1], TOKENS, tokenizer, 5)


def test_texts_of_nothing_are_left_out_and_counted():
    rows = [{"text": " \n"}, {"text": "ab"}, {"text": ""}]
    (example,), lengths = encode_rows(rows, TEXT, Bytewise(), 5)
    assert (example.row, lengths.empty, lengths.examples) == (2, 2, 1)
    with pytest.raises(InputError, match="No row has any text"):
        encode_rows(rows[:1], TEXT, Bytewise(), 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((FORMAT, 5, "split"), "truncation: split is for plain text, not for prompt-completion"),
        ((TEXT, 1, "split"), "truncation: split needs a max_length of 2 or more"),
        ((FORMAT, 1, "drop"), "All 2 examples are longer than max_length=1"),
    ],
)
def test_settings_that_leave_nothing(arguments, message):
    row_format, max_length, truncation = arguments
    rows = ROWS if row_format is FORMAT else [{"text": "abc"}]
    with pytest.raises(InputError, match=message):
        encode_rows(rows, row_format, Bytewise(), max_length, truncation)


def test_a_stream_says_at_once_that_it_cannot_refuse_long_examples():
    with pytest.raises(InputError, match="choose drop, left or right"):
        encode_stream(iter(()), FORMAT, Bytewise(), 5, "error")


def test_a_tokenizer_without_an_end_is_refused():
    tokenizer = Bytewise()
    tokenizer.eos_token_id = None
    with pytest.raises(InputError, match="no end-of-text token"):
        encode_rows(ROWS, FORMAT, tokenizer, 64)


def test_rows_are_numbered_as_in_the_file():
    rows = [{"prompt": "abcdefgh", "completion": "x"}, {"prompt": "ab", "completion": "c"}]
    (kept,), _ = encode_rows(rows, FORMAT, Bytewise(), 5, "drop")
    assert kept.row == 2


def test_a_later_row_that_does_not_fit_is_named(tokenizer):
    with pytest.raises(InputError, match="Row 3 has no field 'completion'"):
        encode_rows([*ROWS, {"prompt": "x"}], FORMAT, tokenizer, 64)


def test_padding_is_masked_by_position_not_by_id():
    """The padding token may be the end of text, which must stay supervised."""
    batch = padded(9)([Encoded([1, 2, 9], [IGNORED, 2, 9]), Encoded([3, 4, 5, 6, 9], [IGNORED] * 4 + [9])])
    assert batch["input_ids"].tolist() == [[1, 2, 9, 9, 9], [3, 4, 5, 6, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORED, 2, 9, IGNORED, IGNORED], [IGNORED] * 4 + [9]]
    assert all(t.dtype == torch.int64 for t in batch.values())


def test_with_the_end_of_text_as_padding_each_answer_still_ends(tokenizer):
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    batch = padded(tokenizer.pad_token_id)(list(encode_rows(ROWS, FORMAT, tokenizer, 64)[0]))
    assert (batch["labels"] == tokenizer.eos_token_id).sum(1).tolist() == [1, 1]
    assert (batch["attention_mask"].sum(1) < batch["input_ids"].shape[1]).any()


def test_a_tokenizer_that_opens_texts_opens_them_once(tokenizer):
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    rows = [*ROWS, {"prompt": "<bos>one", "completion": " two"}]
    for example in encode_rows(rows, FORMAT, tokenizer, max_length=64)[0]:
        assert example.input_ids.count(tokenizer.bos_token_id) == 1
        assert example.input_ids[0] == tokenizer.bos_token_id
        assert len(example.labels) == len(example.input_ids)
