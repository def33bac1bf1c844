"""What the kernels become for GPUs: no default configuration spills registers; and the model of their time, by hand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.kernels import FEATURES, ROWS, cases, model, work
from bonetune.ops.backend import SIZES

ROOT = Path(__file__).parents[2]


def compiled(*arguments):
    """The table's rows. A process of its own: here Triton interprets."""
    pytest.importorskip("triton", reason="the kernels need Triton: pip install 'bonetune[triton]'")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.kernels", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[2:]]


def assert_fits(rows):
    for kernel, dtype, r, capability, registers, stack, shared in rows:
        where = f"{kernel}, {dtype}, r={r}, {capability}"
        assert int(stack) == 0, f"{where} spills"
        assert 0 < int(registers) <= 255, where
        assert int(shared) <= 99 * 1024, f"{where}: more shared memory than an RTX 30 or 40 has"


def test_the_usual_configuration_fits_the_registers():
    rows = compiled("--r", "64", "--dtype", "bf16")
    assert {row[3] for row in rows} == {"8.0", "9.0"}
    assert len({row[0] for row in rows}) == len(cases(torch.bfloat16, 64))
    assert_fits(rows)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("r", SIZES)
def test_every_default_configuration_fits_the_registers(r, dtype):
    assert_fits(compiled("--r", str(r), "--dtype", dtype))


def test_the_model_is_the_longer_of_memory_and_arithmetic():
    sums = work(64)["shard sum of x"]
    assert sums.bytes == 2 * ROWS * FEATURES + 2 * ROWS * 64
    assert sums.seconds(1e15, 1e12) == sums.bytes / 1e12
    gradient = work(64)["bat gradient"]
    assert gradient.seconds(1e12, 1e15) == gradient.operations / 1e12
    assert "bat gradient" in model()
