import json

import numpy as np
import pytest

from bonetune.data import EncodedSet, RowFormat, encode_rows, prepare, stream, write_binidx
from bonetune.data.streaming import HEAD
from bonetune.errors import InputError

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
PAIRS = [{"prompt": f"{a} plus", "completion": f" {b}"} for a in NUMBERS for b in NUMBERS]
CHATS = [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": a * 2}]} for a in NUMBERS]
TEXTS = [{"text": f"{a} is {a}"} for a in NUMBERS]
JUDGED = [{"text": a, "label": "long" if len(a) > 3 else "short"} for a in NUMBERS]


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def write(tmp_path):
    def write(rows, name="rows.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return write


def encoded(rows, tokenizer, max_length=64, truncation="error"):
    return encode_rows(rows, RowFormat.detect(rows[0]), tokenizer, max_length, truncation)[0]


def contents(examples):
    return [(tuple(e.input_ids), tuple(e.labels)) for e in examples]


def test_one_file(write, tokenizer):
    ready = prepare(tokenizer, dataset_name=write(PAIRS), max_length=64, kept_prompts=2)
    assert ready.train == encoded(PAIRS, tokenizer)
    assert ready.evaluation is None
    assert ready.classes is None
    assert ready.findings == ()
    assert ready.lengths.examples == len(ready.sources) == 100
    assert ready.prompts == [("one plus", " one"), ("one plus", " two")]
    assert ready.row_formats == (RowFormat("prompt-completion", ("prompt", "completion")),)


def test_several_files_each_in_its_format(write, tokenizer):
    names = (write(PAIRS[:12], "a.jsonl"), write(CHATS, "b.jsonl"), write(TEXTS, "c.jsonl"))
    ready = prepare(tokenizer, dataset_name=names, dataset_weights=(1, 2, 3), max_length=64, kept_prompts=5)
    assert list(ready.train) == [e for rows in (PAIRS[:12], CHATS, TEXTS) for e in encoded(rows, tokenizer)]
    assert ready.sources.tolist() == [0] * 12 + [1] * 10 + [2] * 10
    assert [found.kind for found in ready.row_formats] == ["prompt-completion", "messages", "text"]
    questions = [answer for _, answer in ready.prompts]
    assert questions == [" one", " two", " three", "oneone", "twotwo"]


def test_the_cache_changes_nothing(write, tokenizer, tmp_path):
    kept, again, without = (
        prepare(tokenizer, dataset_name=write(PAIRS), max_length=64, cache_tokens=cache, eval_size=0.3)
        for cache in (True, True, False)
    )
    assert kept.train == again.train == without.train
    assert kept.lengths == again.lengths == without.lengths
    assert len(list((tmp_path / "cache" / "bonetune" / "tokens").iterdir())) == 1


def test_held_out_rows_and_what_equals_them_are_not_trained_on(write, tokenizer):
    name = write(PAIRS + PAIRS[:50])
    ready = prepare(tokenizer, dataset_name=name, eval_size=30, max_length=64, seed=3)
    held_out, trained = set(contents(ready.evaluation)), set(contents(ready.train))
    assert len(ready.evaluation) == 30
    assert not held_out & trained
    assert held_out | trained == set(contents(encoded(PAIRS, tokenizer)))
    assert len(ready.train) == len(ready.sources) == ready.lengths.examples
    copies = 150 - 30 - len(ready.train)
    said = {finding.name: finding.message for finding in ready.findings}
    assert said["copies-of-held-out"] == f"{copies} training rows equal held-out ones and were left out."
    assert prepare(tokenizer, dataset_name=name, eval_size=30, max_length=64, seed=3).evaluation == ready.evaluation
    assert prepare(tokenizer, dataset_name=name, eval_size=30, max_length=64, seed=4).evaluation != ready.evaluation


def test_an_evaluation_file_that_is_trained_on_draws_a_warning(write, tokenizer):
    held_out = write(PAIRS[90:95], "test.jsonl")
    ready = prepare(tokenizer, dataset_name=write(PAIRS), dataset_split="train[:92]", eval_dataset_name=held_out, max_length=64)
    assert ready.evaluation == encoded(PAIRS[90:95], tokenizer)
    assert [(f.name, f.message[:9]) for f in ready.findings] == [("overlap", "2 of 5 he")]


def test_plain_text_is_split(write, tokenizer):
    ready = prepare(tokenizer, dataset_name=write(TEXTS), max_length=4, truncation="split")
    assert ready.train == encoded(TEXTS, tokenizer, 4, "split")
    assert ready.prompts == []
    assert [f.name for f in ready.findings if f.name == "truncated"]


@pytest.mark.parametrize("files", ["jsonl", "binidx"])
def test_token_ids_are_prepared_and_streamed_as_their_text_is(write, tokenizer, tmp_path, files):
    rows = [{"input_ids": e.input_ids} for e in encoded(TEXTS, tokenizer)]
    name = write(rows, "ids.jsonl") if files == "jsonl" else str(tmp_path / "ids")
    if files == "binidx":
        write_binidx(name, (row["input_ids"] for row in rows))
    settings = {"max_length": 4, "truncation": "split"}
    ready = prepare(tokenizer, dataset_name=(name, write(PAIRS, "pairs.jsonl")), max_length=64, kept_prompts=2)
    assert list(ready.train) == [*encoded(TEXTS, tokenizer), *encoded(PAIRS, tokenizer)]
    assert ready.prompts == [("one plus", " one"), ("one plus", " two")]
    assert ready.row_formats[0] == RowFormat("tokens", ("input_ids",))
    assert not ready.opened
    whole = prepare(tokenizer, dataset_name=write(TEXTS, "texts.jsonl"), **settings)
    for _ in range(2):  # the second time from the cache
        assert prepare(tokenizer, dataset_name=name, **settings).train == whole.train
    opened = stream(tokenizer, dataset_name=name, **settings)
    assert EncodedSet(opened) == EncodedSet(opened) == whole.train
    assert opened.prompts == []


def test_token_ids_without_an_end_are_a_note(write, tokenizer):
    name = write([{"input_ids": [n, n + 1]} for n in range(5, 9)])
    for made in (prepare(tokenizer, dataset_name=name), stream(tokenizer, dataset_name=name)):
        assert [finding.name for finding in made.findings] == ["given-without-end"]
    held_out = prepare(tokenizer, dataset_name=name, eval_size=1)
    assert (len(held_out.train), len(held_out.evaluation)) == (3, 1)


def test_prompts_are_learned_by_choice(write, tokenizer):
    ready = prepare(tokenizer, dataset_name=write(PAIRS), max_length=64, completion_only_loss=False)
    assert ready.lengths.supervised == ready.lengths.tokens - 100


def test_a_classifier_has_classes_and_a_regression_none(write, tokenizer):
    ready = prepare(tokenizer, dataset_name=write(JUDGED), task_type="SEQ_CLS", eval_size=2)
    assert ready.classes == ("long", "short")
    by_row = {e.row: e.labels for part in (ready.train, ready.evaluation) for e in part}
    assert by_row == {n: [int(len(word) <= 3)] for n, word in enumerate(NUMBERS, 1)}
    numbers = write([{"text": a, "label": len(a) / 2} for a in NUMBERS])
    ready = prepare(tokenizer, dataset_name=numbers, task_type="SEQ_CLS")
    assert ready.classes == ()
    assert [e.labels for e in ready.train] == [[len(a) / 2] for a in NUMBERS]
    assert ready.prompts == [(a, str(len(a) / 2)) for a in NUMBERS]


def test_a_sequence_to_sequence_model(write, tokenizer):
    ready = prepare(tokenizer, dataset_name=write(PAIRS), task_type="SEQ_2_SEQ_LM", kept_prompts=1)
    assert ready.train[3].input_ids == tokenizer("one plus").input_ids
    assert ready.train[3].labels == [*tokenizer(" four").input_ids, tokenizer.eos_token_id]
    assert ready.prompts == [("one plus", " one")]


BAD = [
    ({"dataset_name": ()}, "dataset_name names no data set"),
    ({"dataset_weights": (1, 2)}, r"dataset_weights \[1, 2\]: give a positive number for each of the 1 data sets"),
    ({"dataset_weights": (0,)}, "give a positive number"),
    ({"dataset_name": "missing.jsonl"}, "missing.jsonl does not exist"),
    ({"dataset_field": ("q", "a")}, "rows.jsonl: Row 1 has no field 'q'"),
    ({"dataset_format": "messages"}, "rows.jsonl: Row 1 has no field 'messages'"),
    ({"task_type": "SEQ_CLS"}, "rows.jsonl: Rows with the fields prompt, completion: name the text's field"),
    ({"eval_dataset_name": "missing.jsonl"}, "missing.jsonl does not exist"),
    ({"dataset_name": "gone.bin"}, "gone.idx does not exist: it belongs beside gone.bin"),
    ({"max_length": 3, "truncation": "drop"}, "rows.jsonl: All 100 examples are longer than max_length=3"),
    ({"max_length": 2, "truncation": "right"}, "rows.jsonl: .* supervised token left when .*cut to max_length=2"),
]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *BAD,
        ({"eval_size": 0.5, "eval_dataset_name": "x.jsonl"}, "Both eval_dataset_name and eval_size"),
        ({"eval_size": 100}, "holds out 100 of 100 rows"),
        ({"max_length": 3}, "rows.jsonl: 100 of 100 examples are longer than max_length=3"),
    ],
)
def test_what_cannot_be_prepared(write, tokenizer, settings, message):
    with pytest.raises(InputError, match=message) as caught:
        prepare(tokenizer, **({"dataset_name": write(PAIRS)} | settings))
    assert "\n" not in str(caught.value)


def test_an_unknown_class_of_the_held_out_rows_is_named(write, tokenizer):
    names = {"dataset_name": write(JUDGED), "eval_dataset_name": write([{"text": "x", "label": "odd"}], "test.jsonl")}
    with pytest.raises(InputError, match=r"test\.jsonl: Row 1: label 'odd' is not among the classes long, short"):
        prepare(tokenizer, task_type="SEQ_CLS", **names)


class TestStream:
    def test_it_gives_what_is_prepared_again_and_again(self, write, tokenizer):
        rows = PAIRS * 12
        settings = {"dataset_name": write(rows), "max_length": 64, "truncation": "drop", "kept_prompts": 3}
        opened, ready = stream(tokenizer, **settings), prepare(tokenizer, **settings)
        assert EncodedSet(opened) == EncodedSet(opened) == ready.train
        assert opened.head == ready.train[:HEAD]
        assert opened.prompts == ready.prompts
        assert opened.row_formats == ready.row_formats
        assert [finding.name for finding in opened.findings] == ["duplicates"]
        assert opened.lengths.examples == HEAD

    def test_several_by_their_weights(self, write, tokenizer):
        names = (write(PAIRS[:12], "a.jsonl"), write(TEXTS, "b.jsonl"))
        opened = stream(tokenizer, dataset_name=names, dataset_weights=(3, 1), max_length=64)
        pairs, texts = encoded(PAIRS[:12], tokenizer), encoded(TEXTS, tokenizer)
        found = list(opened)
        assert found == list(opened)
        given = np.asarray([example in list(texts) for example in found])
        assert given[:40].sum() == 10
        assert [e for e in found if e in list(pairs)][:24] == list(pairs) * 2
        assert [answer for _, answer in opened.prompts[:2]] == [" one", " two"]

    def test_rows_are_read_when_they_are_needed(self, write, tokenizer):
        name = write(PAIRS * 12)
        with open(name, "a") as file:
            file.write("broken\n")
        opened = stream(tokenizer, dataset_name=name, max_length=64)
        iterator = iter(opened)
        assert [next(iterator) for _ in range(3)] == list(opened.head[:3])
        with pytest.raises(InputError, match="line 1201: not JSON"):
            list(iterator)

    def test_held_out_rows_are_read_whole(self, write, tokenizer):
        held_out = write(PAIRS[90:], "test.jsonl")
        opened = stream(tokenizer, dataset_name=write(PAIRS[:90]), eval_dataset_name=held_out, max_length=64)
        assert opened.evaluation == encoded(PAIRS[90:], tokenizer)

    @pytest.mark.parametrize("mode", ["left", "right"])
    def test_long_rows_are_cut(self, write, tokenizer, mode):
        opened = stream(tokenizer, dataset_name=write(TEXTS), max_length=4, truncation=mode)
        assert list(opened) == list(encoded(TEXTS, tokenizer, 4, mode))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            *(pair for pair in BAD if pair[0].get("task_type") != "SEQ_CLS" and pair[0].get("max_length") != 3),
            ({"truncation": "error"}, "choose drop, left or right"),
            ({"eval_size": 0.1}, "eval_size needs all rows"),
            ({"task_type": "SEQ_CLS"}, "turn streaming off"),
            ({"dataset_split": "train[:10%]"}, "needs the number of rows, which a stream does not know"),
            ({"max_length": 3}, "rows.jsonl: No example is of at most max_length=3 tokens"),
        ],
    )
    def test_what_cannot_be_streamed(self, write, tokenizer, settings, message):
        with pytest.raises(InputError, match=message):
            stream(tokenizer, **({"dataset_name": write(PAIRS)} | settings))


def test_a_weighted_data_set_that_is_held_out_whole_is_named(write, tokenizer):
    names = (write(PAIRS, "a.jsonl"), write(TEXTS[:1], "b.jsonl"))
    settings = {"dataset_name": names, "eval_size": 95, "max_length": 64}
    with pytest.raises(InputError, match=r"eval_size=95 leaves no row of .*b\.jsonl to train on"):
        prepare(tokenizer, dataset_weights=(1, 1), **settings)
    assert len(prepare(tokenizer, **settings).train) == 6


def test_rows_of_several_files_are_named_with_theirs(write, tokenizer):
    names = [write(rows, name) for rows, name in ((PAIRS[:3], "a.jsonl"), (PAIRS[3:5] + PAIRS[1:2], "b.jsonl"))]
    for read in (prepare, stream):
        said = {found.name: found.message for found in read(tokenizer, dataset_name=names, max_length=64).findings}
        which = r"row 3 of " + names[1]
        assert said["duplicates"] == f"1 of 6 examples are exact copies of earlier ones ({which})."


def test_mixed_labels_are_named_with_their_file_and_row(write, tokenizer):
    names = [write([{"text": "a", "label": label}] * 2, f"{label}.jsonl") for label in (1, "x")]
    with pytest.raises(InputError, match=r"x\.jsonl: Row 1: label 'x' is no number, and 1 \(.*1\.jsonl: Row 1\) is one"):
        prepare(tokenizer, dataset_name=names, task_type="SEQ_CLS")


def test_a_stream_counts_what_it_drops_and_cuts(write, tokenizer):
    long = {"prompt": "one", "completion": " two" * 60}
    asked = {"prompt": "one " * 60, "completion": " two"}
    name = write([long, asked, *PAIRS])
    dropped = stream(tokenizer, dataset_name=name, max_length=32, truncation="drop")
    cut = stream(tokenizer, dataset_name=name, max_length=32, truncation="right")
    assert dropped.lengths == prepare(tokenizer, dataset_name=name, max_length=32, truncation="drop").lengths
    assert cut.lengths == prepare(tokenizer, dataset_name=name, max_length=32, truncation="right").lengths
    assert (dropped.lengths.dropped, cut.lengths.truncated, cut.lengths.silenced) == (2, 1, 1)
    assert "dropped" in [finding.name for finding in dropped.findings]
    assert {"truncated", "silenced"} <= {finding.name for finding in cut.findings}


def test_a_stream_leaves_out_what_teaches_nothing_beyond_its_head(write, tokenizer):
    rows = [{"text": "one two"}] * HEAD + [{"text": "<|im_end|>"}, {"text": "three"}]
    opened = stream(tokenizer, dataset_name=write(rows), max_length=64)
    for _ in range(2):
        assert [example.row for example in opened] == [*range(1, HEAD + 1), HEAD + 2]
        assert opened.outcomes == {"whole": HEAD + 2, "unsupervised": 1}
