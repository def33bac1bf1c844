import numpy as np
import pytest

from bonetune.data import Encoded, EncodedSet, Lengths
from bonetune.data.examples import IGNORED
from bonetune.data.preflight import check
from bonetune.errors import InputError

BOS, EOS = 0, 1


def example(*ids, prompt=1, row=1):
    return Encoded(list(ids), [IGNORED] * prompt + list(ids[prompt:]), row)


def found(tokenizer, examples, evaluation=None, counts=None, **told):
    train = EncodedSet(examples)
    lengths = Lengths.of(train, told.get("task_type", "CAUSAL_LM"), **(counts or {}))
    held_out = EncodedSet(evaluation) if evaluation is not None else None
    return check(train, tokenizer, lengths=lengths, evaluation=held_out, **({"max_length": 2000} | told))


def messages(*arguments, **settings):
    return {finding.name: finding.message for finding in found(*arguments, **settings)}


def test_nothing_is_found_in_good_examples(tokenizer):
    assert found(tokenizer, [example(5, 6, EOS), example(7, 8, 9, EOS, row=2)], [example(5, 7, EOS)]) == ()


def test_an_example_without_a_supervised_token_is_refused_and_shown(tokenizer):
    ids = tokenizer("the lazy").input_ids
    silent = Encoded(ids, [IGNORED] * len(ids), 4)
    good = example(5, 6, EOS)
    with pytest.raises(
        InputError, match=r"1 of 2 training examples have no supervised token \(row 4\).*'the lazy' \[nothing-supervised\]"
    ):
        found(tokenizer, [good, silent])
    with pytest.raises(InputError, match="1 of 1 held-out examples have no supervised token"):
        found(tokenizer, [good], [silent])
    # the first token is nobody's to predict
    with pytest.raises(InputError, match="have no supervised token"):
        found(tokenizer, [Encoded([EOS], [EOS], 1)])


def test_an_example_that_was_not_cut_must_end(tokenizer):
    endless = example(*tokenizer("one two").input_ids, row=3)
    with pytest.raises(
        InputError, match=r"1 examples that were not cut .*'<\|im_end\|>', supervised \(row 3\).*\[end-not-learned\]"
    ):
        found(tokenizer, [example(5, 6, EOS), endless])
    assert found(tokenizer, [endless], max_length=len(endless.input_ids)) == ()


def test_given_ids_may_end_as_they_do_and_that_is_said(tokenizer):
    endless, whole = example(5, 6, 7, row=3), example(5, 6, EOS)
    said = messages(tokenizer, [whole, endless], kinds=["tokens"])
    assert "1 examples of token ids do not end with the end-of-text token '<|im_end|>' (row 3)" in said["given-without-end"]
    assert found(tokenizer, [whole], kinds=["tokens"]) == ()
    told = {"sources": np.asarray([0, 1]), "names": ["a", "b"], "max_length": 2000}
    assert "row 3 of b" in messages(tokenizer, [whole, endless], kinds=["text", "tokens"], **told)["given-without-end"]
    with pytest.raises(InputError, match="end-not-learned"):
        found(tokenizer, [whole, endless], kinds=["tokens", "text"], **told)


def test_errors_come_together(tokenizer):
    with pytest.raises(InputError) as caught:
        found(tokenizer, [Encoded([5, 6], [IGNORED] * 2, 1), example(5, 6, 7)])
    assert all(name in str(caught.value) for name in ("[nothing-supervised]", "[end-not-learned]"))
    assert "\n" not in str(caught.value)


def test_a_long_example_is_shown_by_its_ends(tokenizer):
    ids = tokenizer("begin " + "the lazy dog " * 200 + "finish").input_ids
    with pytest.raises(InputError) as caught:
        found(tokenizer, [Encoded(ids, [IGNORED] * len(ids), 1)], max_length=5000)
    assert "'begin the" in str(caught.value)
    assert "finish'" in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_what_was_left_out_and_cut_is_counted(tokenizer):
    counts = {"dropped": 3, "truncated": 2, "empty": 1}
    said = messages(tokenizer, [example(5, 6, EOS)], counts=counts)
    assert said["dropped"].startswith("3 of 4 examples are longer")
    assert said["truncated"].startswith("2 rows are longer")
    assert said["empty-texts"].startswith("1 rows have no text")


def test_a_beginning_token_too_many(tokenizer):
    twice = [example(BOS, BOS, 6, EOS, prompt=2, row=2), example(BOS, 5, BOS, EOS), example(5, EOS)]
    assert "1 examples begin with '<bos>' twice (row 2)" in messages(tokenizer, twice)["opened-twice"]
    tokenizer.bos_token = None
    assert "opened-twice" not in messages(tokenizer, twice)


def test_an_example_far_longer_than_all_others(tokenizer):
    short, long = example(*range(5, 105), EOS), example(*[7] * 400, EOS, row=9)
    assert "The example of row 9 has 401 tokens and the next longest 101" in messages(tokenizer, [short, long])["far-longer"]
    assert "far-longer" not in messages(tokenizer, [short, long, long])
    assert "far-longer" not in messages(tokenizer, [example(5, EOS), short])


def test_copies_are_counted_and_named(tokenizer):
    examples = [example(5, 6, EOS, row=n) for n in range(1, 6)] + [example(5, 6, EOS, prompt=2, row=6)]
    assert (
        messages(tokenizer, examples)["duplicates"] == "4 of 6 examples are exact copies of earlier ones (rows 2, 3, 4, ...)."
    )


def test_held_out_examples_that_are_trained_on(tokenizer):
    held_out = [example(5, 7, EOS, row=1), example(5, 6, EOS, row=2)]
    said = messages(tokenizer, [example(5, 6, EOS, row=8)], held_out)
    assert "1 of 2 held-out examples are also trained on (row 2 of the held-out data)" in said["overlap"]


def test_empty_answers(tokenizer):
    blank = tokenizer(" \n").input_ids
    examples = [example(5, EOS, row=1), example(5, *blank, EOS, row=2), example(5, 6, EOS, row=3)]
    assert messages(tokenizer, examples)["empty-answers"] == "2 examples have an empty answer (rows 1, 2)."
    written = [Encoded([5], [EOS], 1), Encoded([5], [6, EOS], 2)]
    assert "1 examples" in messages(tokenizer, written, task_type="SEQ_2_SEQ_LM")["empty-answers"]


def test_classes_that_are_hardly_there(tokenizer):
    def labelled(*labels):
        return [Encoded([5, n], [label], n) for n, label in enumerate(labels, 6)]

    settings = {"task_type": "SEQ_CLS", "classes": ("a", "b", "c")}
    said = messages(tokenizer, labelled(0, 0, 1), **settings)
    assert said == {
        "rare-classes": "Classes with one example only: b.",
        "absent-classes": "Classes without an example to train on: c.",
    }
    with pytest.raises(InputError, match=r"All 2 examples are of the class 'b': there is nothing to tell apart. \[one-class\]"):
        found(tokenizer, labelled(1, 1), **settings)
    assert messages(tokenizer, labelled(0.5, 0.5), task_type="SEQ_CLS") == {}
