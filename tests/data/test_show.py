import pytest

from bonetune.data import Encoded, RowFormat, encode_rows, marked, pieces
from bonetune.data.examples import IGNORED


@pytest.mark.parametrize("answer", ["two", "", " ä€𝄞 ", "a\nb"])
@pytest.mark.parametrize("prompt", ["one?", "€", "x <|im_start|> y "])
def test_pieces_are_the_text_and_what_is_supervised(tokenizer, prompt, answer):
    row = {"prompt": prompt, "completion": answer}
    (example,), _ = encode_rows([row], RowFormat.detect(row), tokenizer, 64)
    assert pieces(example, tokenizer) == [(prompt, False), (answer + "<|im_end|>", True)]
    assert marked(example, tokenizer) == f"{prompt}⟦{answer}<|im_end|>⟧"


def test_a_character_across_an_edge_stays_whole(tokenizer):
    ids = tokenizer("a€b").input_ids
    assert len(ids) == 5
    for edge in range(1, 5):
        example = Encoded(ids, [IGNORED] * edge + ids[edge:])
        parts = pieces(example, tokenizer)
        assert "".join(text for text, _ in parts) == "a€b"
        assert [supervised for _, supervised in parts] == [False, True]


def test_given_ids_are_shown_as_text(tokenizer):
    row = {"input_ids": tokenizer("the lazy dog").input_ids}
    (example,), _ = encode_rows([row], RowFormat.detect(row), tokenizer, 64)
    (_, first), (rest, second) = pieces(example, tokenizer)
    assert (first, second) == (False, True)
    assert marked(example, tokenizer) == "the lazy dog".removesuffix(rest) + f"⟦{rest}⟧"


def test_the_first_token_is_never_supervised(tokenizer):
    ids = tokenizer("ab").input_ids
    assert marked(Encoded(ids, list(ids)), tokenizer) == "a⟦b⟧"


def test_what_is_no_causal_example(tokenizer):
    ids, answer = tokenizer("one").input_ids, tokenizer("two three").input_ids
    assert marked(Encoded(ids, answer), tokenizer) == "one⟦two three⟧"
    assert marked(Encoded(ids, [1]), tokenizer) == marked(Encoded(ids, [0.5]), tokenizer) == "one"
