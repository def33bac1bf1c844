import pytest
import torch

from bonetune.data import Encoded, RowFormat, collate, encode_rows, prompt_tokens
from bonetune.data.encoding import IGNORED
from bonetune.errors import InputError

FORMAT = RowFormat("prompt-completion", ("prompt", "completion"))
ROWS = [{"prompt": "what is one plus two?", "completion": " three."}, {"prompt": "the lazy", "completion": " dog"}]


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


def test_a_tokenizer_that_opens_texts_opens_them_once(tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    (example, _), _ = encode_rows(ROWS, FORMAT, tokenizer, max_length=64)
    assert example.input_ids.count(tokenizer.bos_token_id) == 1
    assert example.input_ids[0] == tokenizer.bos_token_id
    assert prompt_tokens(tokenizer, "a") == prompt_tokens(tokenizer, "<bos>a") == tokenizer("a").input_ids


def test_too_long_is_an_error_with_the_count_and_the_99th_percentile(tokenizer):
    rows = [{"prompt": "a" * n, "completion": "b"} for n in range(1, 101)]
    with pytest.raises(
        InputError, match=r"92 of 100 examples are longer than max_length=10 tokens \(99th percentile \d+, longest"
    ):
        encode_rows(rows, FORMAT, _bytewise(tokenizer), max_length=10)


def _bytewise(tokenizer):
    class Bytewise:
        eos_token, eos_token_id = "\x00", 0

        def __call__(self, text, add_special_tokens=True):
            return type("Encoding", (), {"input_ids": list(text.encode())})()

    return Bytewise()


def test_truncation_by_choice(tokenizer):
    rows = [{"prompt": "abcdef", "completion": "gh"}, {"prompt": "a", "completion": "b"}]
    whole = [*b"abcdefgh", 0]
    kept = {mode: encode_rows(rows, FORMAT, _bytewise(tokenizer), 7, mode) for mode in ("drop", "left", "right")}
    assert [e.input_ids for e in kept["drop"][0]] == [[*b"ab", 0]]
    assert kept["drop"][1].dropped == 1
    assert kept["left"][0][0].input_ids == whole[-7:]
    assert kept["right"][0][0].input_ids == whole[:7]


def test_examples_with_nothing_to_learn_are_refused(tokenizer):
    rows = [{"prompt": "abcdefgh", "completion": "x"}]
    with pytest.raises(InputError, match="1 of 1 examples have no supervised token"):
        encode_rows(rows, FORMAT, _bytewise(tokenizer), 5, "right")
    with pytest.raises(InputError, match="All 1 examples are longer than max_length=5"):
        encode_rows(rows, FORMAT, _bytewise(tokenizer), 5, "drop")


def test_rows_are_numbered_as_in_the_file(tokenizer):
    rows = [{"prompt": "abcdefgh", "completion": "x"}, {"prompt": "ab", "completion": "c"}]
    (kept,), _ = encode_rows(rows, FORMAT, _bytewise(tokenizer), 5, "drop")
    assert kept.row == 2


def test_an_empty_prompt_needs_an_opening_token(tokenizer):
    with pytest.raises(InputError, match="An empty prompt"):
        prompt_tokens(tokenizer, "")


def test_a_later_row_that_does_not_fit_is_named(tokenizer):
    with pytest.raises(InputError, match="Row 3 has no field 'completion'"):
        encode_rows([*ROWS, {"prompt": "x"}], FORMAT, tokenizer, 64)


def test_padding_is_masked_by_position_not_by_id():
    """The padding token may be the end of text, which must stay supervised."""
    batch = collate(pad_token_id=9)([Encoded([1, 2, 9], [IGNORED, 2, 9]), Encoded([3, 4, 5, 6, 9], [IGNORED] * 4 + [9])])
    assert batch["input_ids"].tolist() == [[1, 2, 9, 9, 9], [3, 4, 5, 6, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORED, 2, 9, IGNORED, IGNORED], [IGNORED] * 4 + [9]]
    assert all(t.dtype == torch.int64 for t in batch.values())
