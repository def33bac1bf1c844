import copy

import pytest
from tokenizers.processors import TemplateProcessing

from bonetune.data import RowFormat, encode_rows
from bonetune.data.encoding import encode_stream
from bonetune.data.labelled import find_classes
from bonetune.errors import InputError

ONE = RowFormat("classification", ("text", "label"))
TWO = RowFormat("classification", ("premise", "hypothesis", "label"))
ASKED = RowFormat("prompt-completion", ("prompt", "completion"))


@pytest.fixture
def special(tokenizer):
    """A tokenizer that frames texts, and pairs of them."""
    tokenizer = copy.deepcopy(tokenizer)
    tokens = [("<bos>", tokenizer.bos_token_id), ("<|im_end|>", tokenizer.eos_token_id)]
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <|im_end|>", pair="<bos> $A <|im_end|> $B <|im_end|>", special_tokens=tokens
    )
    return tokenizer


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["pos", "neg", "pos"], ("neg", "pos")),
        ([10, 9, 2], ("2", "9", "10")),
        (["10", "9", "2"], ("2", "9", "10")),
        ([True, False], ("False", "True")),
        ([0.5, 1], ()),
        (["0.5", "1"], ()),
        ([1.0, 2.0], ()),
    ],
)
def test_classes_are_told_from_numbers(labels, classes):
    assert find_classes(labels) == classes


def test_a_text_and_its_class(special):
    rows = [{"text": "the lazy dog", "label": "b"}, {"text": "fox", "label": "a"}]
    encoded, lengths = encode_rows(rows, ONE, special, 64, task_type="SEQ_CLS", classes=("a", "b"))
    for example, row, label in zip(encoded, rows, (1, 0), strict=True):
        assert example.input_ids == special(row["text"]).input_ids
        assert example.labels == [label]
    assert (lengths.examples, lengths.supervised) == (2, 2)


def test_a_pair_and_its_number(special):
    rows = [{"premise": "one", "hypothesis": "two", "label": "0.25"}, {"premise": "a", "hypothesis": "b", "label": 3}]
    encoded, _ = encode_rows(rows, TWO, special, 64, task_type="SEQ_CLS")
    for example, row in zip(encoded, rows, strict=True):
        assert example.input_ids == special(row["premise"], row["hypothesis"]).input_ids
        assert example.labels == [float(row["label"])]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_long_text_is_cut_between_its_special_tokens(special, side):
    rows = [{"text": "one", "label": 1}, {"text": "the quick brown fox jumps over the lazy dog", "label": 0}]
    inner = special(rows[1]["text"], add_special_tokens=False).input_ids
    encoded, lengths = encode_rows(rows, ONE, special, 6, side, task_type="SEQ_CLS", classes=("0", "1"))
    kept = inner[:4] if side == "right" else inner[-4:]
    assert encoded[1].input_ids == [special.bos_token_id, *kept, special.eos_token_id]
    assert encoded[0].input_ids == special("one").input_ids
    assert lengths.truncated == 1
    assert special.truncation_side == "right"
    assert list(encode_stream(rows, ONE, special, 6, side, task_type="SEQ_CLS", classes=("0", "1"))) == list(encoded)


@pytest.mark.parametrize(
    ("label", "classes", "message"),
    [("c", ("a", "b"), "Row 1: label 'c' is not among the classes a, b"), ("c", (), "Row 1: label 'c' is no number")],
)
def test_a_label_that_is_none(special, label, classes, message):
    with pytest.raises(InputError, match=message):
        encode_rows([{"text": "a", "label": label}], ONE, special, 64, task_type="SEQ_CLS", classes=classes)


def test_a_prompt_and_the_answer_that_is_written_for_it(special, tokenizer):
    rows = [{"prompt": "the lazy", "completion": "dog"}, {"prompt": "one", "completion": ""}]
    for end in (special, tokenizer):  # one ends answers itself, the other does not
        encoded, lengths = encode_rows(rows, ASKED, end, 64, task_type="SEQ_2_SEQ_LM")
        for example, row in zip(encoded, rows, strict=True):
            assert example.input_ids == end(row["prompt"]).input_ids
            answer = end(row["completion"]).input_ids
            assert example.labels == (answer if end is special else [*answer, end.eos_token_id])
        assert lengths.supervised == sum(len(e.labels) for e in encoded)


def test_both_have_a_limit(special):
    long = "the quick brown fox jumps over the lazy dog"
    rows = [{"prompt": long, "completion": "one"}, {"prompt": "one", "completion": long}]
    with pytest.raises(InputError, match="2 of 2 examples are longer than max_length=6"):
        encode_rows(rows, ASKED, special, 6, task_type="SEQ_2_SEQ_LM")
    encoded, _ = encode_rows(rows, ASKED, special, 6, "left", task_type="SEQ_2_SEQ_LM")
    inner = special(long, add_special_tokens=False).input_ids
    assert encoded[0].input_ids == [special.bos_token_id, *inner[-4:], special.eos_token_id]
    assert encoded[1].labels == special(long).input_ids[:6]


@pytest.mark.parametrize("labels", [[1, 1, "a"], ["0.5", "1", "nan"], ["3", "4", "n/a"], [1, 0, True]])
def test_texts_among_numbers_are_named(labels):
    with pytest.raises(InputError, match=rf"row 2: label {labels[2]!r} is no number, and {labels[0]!r} \(row 0\) is one"):
        find_classes(labels, called="row {}".format)


@pytest.mark.parametrize("labels", [[1.0, 0.0, 1], ["1.0", "0.0"]])
def test_whole_floats_are_classes_where_there_are_several(special, labels):
    assert find_classes(labels, 2) == ("0", "1")
    rows = [{"text": "one", "label": label} for label in labels]
    encoded, _ = encode_rows(rows, ONE, special, 64, task_type="SEQ_CLS", classes=("0", "1"))
    assert [example.labels for example in encoded] == [[int(float(label))] for label in labels]
    with pytest.raises(InputError, match="the labels are numbers to be predicted"):
        find_classes([*labels, 0.5], 2)


def test_codes_keep_their_names():
    assert find_classes(["01", "02"], 2) == ("01", "02")


@pytest.mark.parametrize(
    ("label", "message"),
    [("", "Row 1, field 'label': the label '' is blank"), (" ", "is blank"), (-100, "Row 1: label -100 stands for no label")],
)
def test_a_label_that_would_not_be_learned(special, label, message):
    with pytest.raises(InputError, match=message):
        encode_rows([{"text": "a", "label": label}], ONE, special, 64, task_type="SEQ_CLS")
