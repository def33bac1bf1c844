"""`bonetune estimate` from outside."""

import json
import shutil

import pytest
import yaml


@pytest.fixture
def config(tmp_path, model_folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = [{"prompt": "one plus two is", "completion": " three" * count} for count in (1, 2, 3, 9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model_name_or_path": str(model_folder),
        "dataset_name": str(tmp_path / "rows.jsonl"),
        "output_dir": str(tmp_path / "run"),
        "r": 4,
        "per_device_train_batch_size": 2,
        "max_length": 64,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "run.yaml"


def test_the_longest_examples_of_the_data(config, run):
    found = json.loads(run("estimate", config, "--json").out)
    long, short = found["batch"]["lengths"]
    assert 64 > long > short
    predicted = found["predicted"]
    parts = ("frozen", "adapter", "gradients", "optimizer", "activations", "transient", "holes")
    assert predicted["total"] == sum(predicted[name] for name in parts)
    assert not (config.parent / "run").exists()


def test_the_longest_that_the_settings_allow(config, run):
    found = json.loads(run("estimate", config, "per_device_train_batch_size=3", "--largest", "--json").out)
    assert found["batch"]["lengths"] == [64, 64, 64]


def test_a_table_with_what_was_measured(config, run):
    shown = run("estimate", config, "--measure").out
    assert all(word in shown for word in ("predicted", "measured", "activations", "sum", "2 examples of at most"))


def test_a_tokenizer_from_elsewhere(config, run, model_folder, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(model_folder / name, bare)
    assert "has no tokenizer" in run("estimate", config, f"model_name_or_path={bare}", code=2).err
    settings = (f"model_name_or_path={bare}", f"tokenizer_name_or_path={model_folder}")
    expected, found = (json.loads(run("estimate", config, *more, "--json").out) for more in ((), (*settings, "--measure")))
    assert found["batch"] == expected["batch"]
    assert found["measured"]["device"] == found["predicted"]["device"]


def test_wrong_input_is_one_line(config, run):
    assert "Unknown key 'lr_'" in run("estimate", config, "lr_=1", code=2).err
    assert "does not exist" in run("estimate", config, f"model_name_or_path={config.parent}/none", "--largest", code=2).err
