import pytest
import reasoning_gym

from bonetune.data import read_rows, stream_rows
from bonetune.data.generated import FIRST_SEEDS
from bonetune.errors import InputError

SOURCE = "reasoning-gym:gsm_symbolic"
WORDS = "reasoning-gym:word_sequence_reversal?min_words=5&max_words=6"


def test_problems_are_reasoning_gyms_with_worked_answers():
    rows = read_rows(SOURCE, "test[:3]")
    problems = reasoning_gym.create_dataset("gsm_symbolic", size=3, seed=FIRST_SEEDS["test"])
    assert rows == [{"instruction": p["question"], "output": p["metadata"]["answer_cot"]} for p in problems]
    assert all(p["answer"] in row["output"] for p, row in zip(problems, rows, strict=True))


def test_settings_stand_behind_a_question_mark_and_answers_without_working_are_the_answer():
    for row in read_rows(WORDS, "train[:20]"):
        words = row["instruction"].strip().rpartition(": ")[2].split(", ")
        assert 5 <= len(words) <= 6
        assert row["output"] == ", ".join(reversed(words))


@pytest.mark.parametrize("source", [SOURCE, WORDS])
def test_a_slice_is_a_part_of_the_whole_and_splits_differ(source):
    rows = read_rows(source, "train[:30]")
    assert read_rows(source, "train[10:20]") == rows[10:20]
    assert list(stream_rows(source, "train[:30]")) == rows
    assert not {row["instruction"] for row in rows} & {row["instruction"] for row in read_rows(source, "test[:30]")}


@pytest.mark.parametrize(
    ("source", "split", "message"),
    [
        ("reasoning-gym:nothing", "train[:2]", "cannot make problems of 'nothing'"),
        (f"{SOURCE}?size_of=3", "train[:2]", "cannot make problems of 'gsm_symbolic' with {'size_of': 3}"),
        (SOURCE, "train", r"has no end: say how many problems of 'train' are meant, train\[:1000\]"),
        (SOURCE, "train[:10%]", "has no end"),
        (SOURCE, "dev[:5]", "has no split 'dev': choose from train, validation, test"),
    ],
)
def test_bad_names(source, split, message):
    with pytest.raises(InputError, match=message):
        read_rows(source, split)
