"""The demonstration's flow on the tiny model; on the real one it is `make demo`."""

import json

import pytest
import torch
from conftest import llama
from safetensors.torch import load_file

import bonetune
from bonetune import demonstration
from bonetune.certificates import Certificate
from bonetune.data import read_rows
from bonetune.errors import InputError
from bonetune.evaluation import Proportion


@pytest.fixture
def tiny(monkeypatch, tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("model")
    llama(max_position_embeddings=512).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    monkeypatch.setattr(demonstration, "smollm2", lambda: str(folder))
    monkeypatch.setattr(demonstration, "TEST_SIZE", 6)
    monkeypatch.setattr(demonstration, "SETTINGS", {"min_words": 2, "max_words": 2})


def small(**changes):
    return {"r": 4, "steps": 2} | changes


def test_the_whole_job(tmp_path, tiny, monkeypatch):
    said, steps = [], []
    folder = tmp_path / "demo"
    result = bonetune.demo(**small(output_dir=str(folder), say=said.append, on_progress=steps.append))
    assert [s.step for s in steps] == [1, 2]
    assert len(said) == 5
    assert result.untrained.total == result.trained.total == 6
    assert not result.gained  # two steps teach a random model nothing, and the demonstration does not claim so
    assert result.certificate.holds
    for name in ("train.jsonl", "test.jsonl", "demo.json", "adapter/adapter_model.safetensors", "adapter/loss.png"):
        assert (folder / name).is_file(), name
    assert (folder / "merged" / "certificate.json").is_file()
    assert json.loads((folder / "demo.json").read_text())["p_value"] == result.p_value
    train, test = (read_rows(str(folder / name)) for name in ("train.jsonl", "test.jsonl"))
    questions = {row["messages"][0]["content"] for row in train}
    assert not [row for row in test if row["messages"][0]["content"] in questions]
    with pytest.raises(InputError, match="already holds a demonstration"):
        bonetune.demo(**small(output_dir=str(folder)))


def test_one_seed_one_result(tmp_path, tiny):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        bonetune.demo(**small(output_dir=str(tmp_path / name), seed=seed))
    a, b, c = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert any(not torch.equal(a[key], c[key]) for key in a)


def test_a_gain_is_claimed_only_above_both_baselines():
    def result(untrained, frequent, trained):
        certificate = Certificate(1, 1, 0.0, 1.0, 0.0, 1.0, None, 0.0, 1.0, "float32", "float32")
        proportions = [Proportion(correct, 100) for correct in (untrained, frequent, trained)]
        return demonstration.DemoResult("bone", 1, *proportions, 0.0, certificate, {}, "")

    assert result(0, 5, 50).gained
    assert not result(0, 45, 50).gained
    assert not result(45, 0, 50).gained


@pytest.mark.parametrize("settings", [{"variant": "batt"}, {"steps": 0}, {"seed": -1}])
def test_bad_input(tmp_path, tiny, settings):
    with pytest.raises(InputError):
        bonetune.demo(**small(output_dir=str(tmp_path / "demo")) | settings)
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("json_wanted", [True, False])
def test_the_command_line_shows_the_result(tmp_path, tiny, monkeypatch, capfd, json_wanted):
    from bonetune_cli.main import main

    arguments = ["demo", "--r", "4", "--steps", "2", "--output-dir", str(tmp_path / "demo"), *(["--json"] * json_wanted)]
    monkeypatch.setattr("sys.argv", ["bonetune", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1  # nothing gained in two steps
    shown = capfd.readouterr().out
    if json_wanted:
        assert json.loads(shown) == json.loads((tmp_path / "demo" / "demo.json").read_text())
    else:
        assert "Merged model: equal up to rounding" in shown
        assert "most frequent answer" in shown
