"""`python -m benchmarks.gpu` from end to end, by Triton's interpreter at tiny sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from bonetune import VARIANTS, ShardSpec

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
    assert all(c["passed"] and c["repeated"] for c in written["checks"])
    assert {c["variant"] for c in written["checks"] if c["what"] == "mixed batch"} == set(VARIANTS) - {"bat"}
    assert written["environment"]["triton"]
    assert {f"{v} {b}" for v in VARIANTS for b in ("triton", "torch")} < {row["method"] for row in written["times"]}
    assert "times mean nothing" in done.stdout
    assert "FAILED" not in done.stdout


def test_says_what_to_do_without_a_gpu():
    done = run(interpret=False)
    assert done.returncode == 1
    assert "TRITON_INTERPRET=1" in done.stderr


def test_a_case_that_fails_is_reported_and_the_others_go_on():
    case = gpu.Case("cpu", ShardSpec("bone", 16), torch.float32, (32, 48, 5))

    def run(by):
        if by == "triton":
            raise RuntimeError("an illegal memory access was encountered")
        return case.layer(by)

    (one,) = case.checked("layer", run)
    assert not one.passed
    assert "illegal memory access" in gpu._checks_table([one, *case.checked("layer", case.layer)])


def test_one_wrong_row_of_many_is_found():
    want = torch.randn(4096, 64, dtype=torch.float64)
    got = want.clone()
    got[17] += 1
    assert (got - want).norm() / want.norm() < gpu.TOLERANCE[torch.bfloat16] < gpu._worst_row(got, want)
