import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from bonetune.training.report import Recorder, Tally, read_metrics


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless it is told otherwise."""
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr("bonetune.training.report.time", SimpleNamespace(perf_counter=lambda: now.seconds))
    return now


def run(recorder, clock, first, last, every=2):
    """Steps of 2 seconds, 10 tokens, 16 with padding, whose loss is their number."""
    for step in range(first, last + 1):
        clock.seconds += 2
        recorder.count(float(step), 10, 16)
        if step % every == 0:
            recorder.log(step, step / 10, learning_rate=0.5)


def test_a_line_is_the_mean_of_the_steps_since_the_last_one(tmp_path, clock):
    seen = []
    recorder = Recorder(tmp_path / "metrics.jsonl", 12, seen.append)
    recorder.begin(0)
    run(recorder, clock, 1, 6, every=3)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert all(line.pop("memory_bytes") > 0 for line in lines)
    common = {"learning_rate": 0.5}
    assert lines == [
        {"step": 3, "epoch": 0.3, "seconds": 6.0, "tokens": 30, "padded_tokens": 48, "loss": 2.0} | common,
        {"step": 6, "epoch": 0.6, "seconds": 12.0, "tokens": 60, "padded_tokens": 96, "loss": 5.0} | common,
    ]
    assert [(p.step, p.steps, p.loss, p.tokens_per_second, p.padded_tokens_per_second, p.seconds_left) for p in seen] == [
        (3, 12, 2.0, 5.0, 8.0, 18.0),
        (6, 12, 5.0, 5.0, 8.0, 12.0),
    ]


def test_a_resumed_run_counts_on_and_its_rates_are_of_this_process(tmp_path, clock):
    whole = Recorder(tmp_path / "whole.jsonl", 8, None)
    whole.begin(0)
    run(whole, clock, 1, 8)

    path = tmp_path / "metrics.jsonl"
    killed = Recorder(path, 8, None)
    killed.begin(0)
    run(killed, clock, 1, 5)
    checkpoint = json.loads(json.dumps(asdict(killed.tally)))  # of step 5, in the middle of a line
    run(killed, clock, 6, 7)
    with path.open("a") as file:
        file.write('{"step": 8, "lo')

    clock.seconds += 3600
    seen = []
    resumed = Recorder(path, 8, seen.append)
    resumed.begin(5, Tally(**checkpoint))
    assert [line["step"] for line in read_metrics(path)] == [2, 4]
    run(resumed, clock, 6, 8)
    without_memory = [
        [{k: v for k, v in line.items() if k != "memory_bytes"} for line in read_metrics(file)]
        for file in (tmp_path / "whole.jsonl", path)
    ]
    assert without_memory[0] == without_memory[1]
    assert [(p.step, p.tokens_per_second, p.seconds_left) for p in seen] == [(6, 5.0, 4.0), (8, 5.0, 0.0)]


def test_the_line_of_an_evaluation_at_the_checkpoint_s_step_stays(tmp_path):
    recorder = Recorder(tmp_path / "metrics.jsonl", 4, None)
    recorder.begin(0)
    for step in (1, 2, 3):
        recorder.write({"step": step, "loss": 1.0})
        recorder.write({"step": step, "eval_loss": 2.0})
    Recorder(tmp_path / "metrics.jsonl", 4, None).begin(2, Tally())
    assert [(line["step"], "eval_loss" in line) for line in read_metrics(tmp_path / "metrics.jsonl")] == [
        *((1, False), (1, True), (2, False), (2, True))
    ]


def test_a_new_run_begins_with_nothing(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    Recorder(tmp_path / "metrics.jsonl", 4, None).begin(0)
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    assert read_metrics(tmp_path / "nowhere.jsonl") == []


def test_a_rehearsal_is_not_counted_as_training(tmp_path, clock):
    recorder = Recorder(tmp_path / "metrics.jsonl", 4, None)
    recorder.begin(0)
    clock.seconds += 100
    recorder.start_clock()
    clock.seconds += 2
    recorder.count(1.0, 10, 10)
    assert recorder.tally.seconds == 2
