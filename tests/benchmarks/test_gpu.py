"""`python -m benchmarks.gpu` from end to end, by Triton's interpreter at tiny sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bonetune import VARIANTS

pytest.importorskip("triton", reason="the kernels need Triton: pip install 'bonetune[triton]'")
ROOT = Path(__file__).parents[2]


def run(*arguments, interpret):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    environment |= {"TRITON_INTERPRET": "1"} if interpret else {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_checks_every_kernel_and_times_every_method(tmp_path):
    done = run("--r", "16", "--rounds", "1", "--json", str(tmp_path / "gpu.json"), interpret=True)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert {(c["variant"], c["tensor"]) for c in written["checks"]} == {(v, t) for v in VARIANTS for t in ("y", "dx", "dtheta")}
    assert {c["dtype"] for c in written["checks"]} == {"bfloat16", "float16", "float32"}
    assert all(c["passed"] for c in written["checks"])
    assert {f"{v} {b}" for v in VARIANTS for b in ("triton", "torch")} < {row["method"] for row in written["times"]}
    assert "times mean nothing" in done.stdout
    assert "FAILED" not in done.stdout


def test_says_what_to_do_without_a_gpu():
    done = run(interpret=False)
    assert done.returncode == 1
    assert "TRITON_INTERPRET=1" in done.stderr
