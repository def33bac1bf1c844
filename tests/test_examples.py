"""The examples do what they say, on the tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import bonetune

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_finetune(tmp_path, model_folder):
    command = [sys.executable, "-W", "default", EXAMPLES / "finetune.py", model_folder, tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["variant"] == "bat-row"
    assert (tmp_path / "out" / "merged" / "model.safetensors").is_file()


def test_run_yaml(tmp_path, model_folder):
    (tmp_path / "train.jsonl").write_text('{"prompt": "one", "completion": " two"}\n' * 8)
    places = {
        "model_name_or_path": str(model_folder),
        "dataset_name": str(tmp_path / "train.jsonl"),
        "output_dir": str(tmp_path / "run"),
    }
    assert bonetune.train(EXAMPLES / "run.yaml", places | {"r": 8}).steps == 1
