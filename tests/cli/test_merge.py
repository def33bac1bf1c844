"""`bonetune merge` from outside: several adapters, both certificates, a result that is rejected."""

import json
import sys

import pytest
from adapted_models import config
from merges import save_adapter


@pytest.fixture
def adapters(tmp_path, model_folder):
    save_adapter(model_folder, tmp_path / "a", config("bone"), seed=1)
    save_adapter(model_folder, tmp_path / "b", config("bat", target_modules=["q_proj"]), seed=2)
    return tmp_path / "a", tmp_path / "b"


def test_several_adapters_layer_by_layer(adapters, tmp_path, run):
    options = ["--scale", "0.5", "--scale", "2", "--certify", "layers", "--json"]
    content = json.loads(run("merge", *adapters, "--output", tmp_path / "merged", *options).out)
    assert (content["method"], content["holds"]) == ("layers", True)
    shown = run("merge", *adapters, "--output", tmp_path / "again", "--certify", "logits").out
    assert "equal up to rounding (float32)" in " ".join(shown.split())


def test_above_the_tolerance_it_exits_with_1(adapters, tmp_path, run):
    options = ["--certify", "layers", "--tolerance", "1e-12"]
    shown = run("merge", adapters[0], "--output", tmp_path / "merged", *options, code=1).err
    assert f"kept as {tmp_path}/merged.rejected" in shown
    assert not (tmp_path / "merged").exists()
    assert (tmp_path / "merged.rejected" / "certificate.json").is_file()


def test_why_it_was_merged_in_memory(adapters, tmp_path, run, monkeypatch):
    from bonetune.merging.plan import NotStreamed

    def refuse(*arguments, **options):
        raise NotStreamed("of a test")

    monkeypatch.setattr(sys.modules["bonetune.merging.merge"], "make_plan", refuse)
    assert "Merged in memory, because of a test." in run("merge", adapters[0], "--output", tmp_path / "merged").err
