"""Schedules: a decay that is a share of the run, and rates that rise, stay and fall."""

import json

import pytest

import bonetune
from bonetune.errors import InputError
from bonetune.training.learning_rate import schedule_settings


@pytest.mark.parametrize(
    ("given", "steps", "decay"), [({}, 100, 10), ({"num_decay_steps": 0.25}, 100, 25), ({"num_decay_steps": 7}, 100, 7)]
)
def test_a_decay_may_be_a_share_of_the_run(given, steps, decay):
    assert schedule_settings("warmup_stable_decay", given | {"min_lr_ratio": 0.1}, steps, 0.03) == {
        "num_decay_steps": decay,
        "min_lr_ratio": 0.1,
    }
    assert schedule_settings("cosine", {"num_cycles": 1}, steps, 0) == {"num_cycles": 1}


def test_the_rate_rises_stays_and_falls(tmp_path, model_folder):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "the quick brown fox"}) + "\n")
    bonetune.train(
        {
            "model_name_or_path": str(model_folder),
            "dataset_name": str(tmp_path / "rows.jsonl"),
            "output_dir": str(tmp_path / "run"),
            "r": 4,
            "learning_rate": 1e-3,
            "max_steps": 20,
            "warmup_steps": 4,
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": {"num_decay_steps": 0.25},
            "sample_prompts": 0,
        }
    )
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    assert rates[:5] == pytest.approx([0, 0.25e-3, 0.5e-3, 0.75e-3, 1e-3])
    assert rates[4:15] == pytest.approx([1e-3] * 11)
    assert rates[15:] == sorted(rates[15:], reverse=True)
    assert 0 < rates[-1] < 0.5e-3


@pytest.mark.parametrize(
    ("given", "steps", "warmup", "message"),
    [
        ({"num_decay_steps": "x"}, 10, 0, "above 0: got 'x'"),
        ({"num_decay_steps": None}, 10, 0, "got None"),
        ({"num_decay_steps": 0}, 10, 0, "got 0"),
        ({"num_decay_steps": 50}, 10, 0, "do not fit into 10"),
        ({"num_decay_steps": 1.0}, 10, 0.1, "a decay of 10 do not fit"),
        ({}, 10, 10, "A warm-up of 10 steps"),
        ({"num_stable_steps": 3}, 10, 2, "leave it out"),
    ],
)
def test_decays_that_the_run_has_no_room_for(given, steps, warmup, message):
    with pytest.raises(InputError, match=message):
        schedule_settings("warmup_stable_decay", given, steps, warmup)
