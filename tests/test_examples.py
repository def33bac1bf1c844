"""The examples do what they say, on the tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import rwkv_models
from safetensors.torch import load_file

import bonetune
from bonetune.training import load_config
from bonetune.training.presets import PRESETS

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_finetune(tmp_path, model_folder):
    command = [sys.executable, "-W", "default", EXAMPLES / "finetune.py", model_folder, tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["variant"] == "bat-row"
    assert (tmp_path / "out" / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["run.yaml", "run.toml"])
def test_run(tmp_path, model_folder, name):
    (tmp_path / "train.jsonl").write_text('{"prompt": "one", "completion": " two"}\n' * 8)
    places = {
        "model_name_or_path": str(model_folder),
        "dataset_name": str(tmp_path / "train.jsonl"),
        "output_dir": str(tmp_path / "run"),
    }
    assert bonetune.train(EXAMPLES / name, places | {"r": 8}).steps == 1


def test_yaml_and_toml_say_the_same():
    assert load_config(EXAMPLES / "run.yaml") == load_config(EXAMPLES / "run.toml")


def test_metamath(tmp_path, model_folder):
    (tmp_path / "train.jsonl").write_text('{"query": "one", "response": "two", "type": "x"}\n' * 64)
    places = {
        "model_name_or_path": str(model_folder),
        "dataset_name": str(tmp_path / "train.jsonl"),
        "dataset_split": "train",
        "output_dir": str(tmp_path / "run"),
        "bf16": False,  # transformers asks for a GPU
    }
    result = bonetune.train(EXAMPLES / "metamath.yaml", places | {"r": 8})
    assert result.steps == 1  # 64 rows are one step of the papers' batch
    assert load_config(tmp_path / "run" / "run.yaml").learning_rate == PRESETS["paper-7b"]["learning_rate"]


def test_metamath_is_the_papers_run():
    config = load_config(EXAMPLES / "metamath.yaml")
    assert (config.variant, config.r, config.learning_rate, config.warmup_steps) == ("bone", 64, 2e-5, 0)
    assert (config.dataset_name, config.dataset_split) == ("meta-math/MetaMathQA", "train[:395000]")
    assert config.dataset_field == ("query", "response")
    assert len(config.target_modules) == 7


def test_glue():
    config = load_config(EXAMPLES / "glue.yaml")
    assert (config.task_type, config.warmup_steps, config.learning_rate) == ("SEQ_CLS", 0.06, None)


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_rwkv(tmp_path, version):
    sizes = {"vocab_size": 65536, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1}
    base = rwkv_models.file(tmp_path / "base.pth", version, **sizes)
    places = {"model_name_or_path": str(base), "output_dir": str(tmp_path / "run"), "max_steps": 2}
    if version == "x060":
        (tmp_path / "documents.jsonl").write_text('{"text": "The quick brown fox jumps over the lazy dog. "}\n' * 8)
        made = bonetune.tokenize(str(tmp_path / "documents.jsonl"), str(tmp_path / "documents"), model=str(base))
        assert made.documents == 8
        places |= {"dataset_name": str(tmp_path / "documents.bin"), "bptt_length": 4}
    else:
        (tmp_path / "train.jsonl").write_text('{"instruction": "one", "output": " two"}\n' * 16)
        places["dataset_name"] = str(tmp_path / "train.jsonl")
    assert bonetune.train(EXAMPLES / f"rwkv{version[2]}.yaml", places).steps == 2
    tensors = load_file(tmp_path / "run" / "adapter_model.safetensors")
    vectors = {"x060": "time_decay", "x070": "w0"}[version]
    assert {f"base_model.model.blocks.0.att.{vectors}", "base_model.model.blocks.0.att.key.bone_block"} <= tensors.keys()
