import json
from itertools import count
from types import SimpleNamespace

import pytest
import torch

from bonetune.training import plan
from bonetune.training.forecast import expected_seconds

ANSWERS = [1, 1, 2, 2, 3, 3, 9, 20]


@pytest.fixture
def settings(tmp_path, model_folder):
    rows = [{"prompt": "the quick brown", "completion": " fox" * n} for n in ANSWERS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model_name_or_path": str(model_folder),
        "dataset_name": str(tmp_path / "rows.jsonl"),
        "output_dir": str(tmp_path / "run"),
        "r": 4,
        "per_device_train_batch_size": 2,
        "max_steps": 10,
        "bone_dropout": 0.1,
    }


@pytest.fixture
def a_batch_takes_seven_seconds(monkeypatch):
    moments = count(0, 7)
    monkeypatch.setattr("bonetune.training.forecast.time", SimpleNamespace(perf_counter=lambda: next(moments)))


@pytest.mark.parametrize(
    "changes",
    [{}, {"max_steps": 30}, {"gradient_accumulation_steps": 3}, {"max_steps": None, "num_train_epochs": 5}, {"packing": False}],
)
def test_it_is_in_proportion_to_the_tokens_of_the_run(settings, a_batch_takes_seven_seconds, changes):
    planned = plan(settings | changes)
    lengths = sorted(len(example.input_ids) for example in planned.train)
    timed = lengths[4] + lengths[5]
    tokens = planned.steps * planned.batches.batch_size * sum(lengths) / len(lengths)
    assert expected_seconds(planned) == pytest.approx(7 / timed * tokens)


def test_several_devices_share_the_work(settings, a_batch_takes_seven_seconds, monkeypatch):
    alone = expected_seconds(plan(settings))
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert expected_seconds(plan(settings)) == pytest.approx(alone)  # four times the examples a step, on four devices


def test_the_model_is_left_as_it_was(settings):
    planned = plan(settings)
    before = {name: tensor.clone() for name, tensor in planned.model.state_dict().items()}
    planned.model.train()
    planned.model.get_submodule("base_model.model.lm_head").eval()
    seconds = expected_seconds(planned)
    assert 0 < seconds < 3600
    assert all(torch.equal(tensor, before[name]) for name, tensor in planned.model.state_dict().items())
    assert all(parameter.grad is None for parameter in planned.model.parameters())
    assert planned.model.training
