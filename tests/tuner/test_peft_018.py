"""Files of the last PEFT that had a Bone of its own, read and written, with that PEFT itself at the other end."""

from pathlib import Path

import old_peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tuner.peft_018 import CASES, inputs, network, randomize, save

from bonetune import BoneConfig

SCRIPT = Path(__file__).with_name("peft_018.py")
pytestmark = pytest.mark.slow


def test_reads_what_0_18_wrote(tmp_path):
    old_peft.run(SCRIPT, "write", tmp_path)
    for name in CASES:
        expected = load_file(tmp_path / f"{name}.safetensors")["y"]
        model = PeftModel.from_pretrained(network(name), tmp_path / name).eval()
        with torch.no_grad():
            assert (network(name)(inputs(name)) - expected).abs().max() > 0.1
            difference = (model(inputs(name)) - expected).norm() / expected.norm()
            assert difference < 1e-6, name
            merged = (model.merge_and_unload()(inputs(name)) - expected).norm() / expected.norm()
            assert merged < 1e-6, name


def test_0_18_reads_what_we_write(tmp_path):
    for name, (_, r, init) in CASES.items():
        model = get_peft_model(network(name), BoneConfig(r=r, init_weights=init, target_modules=["first", "second"]))
        randomize(model)
        save(model, name, tmp_path)
    warned = old_peft.run(SCRIPT, "read", tmp_path)
    assert "['variant']" in warned  # the one key that 0.18 does not know; it says that it ignores it


@pytest.mark.parametrize("variant", ["mini", "bat-row", "bat-free", "bat-left"])
def test_0_18_stops_at_what_it_would_misread(tmp_path, variant):
    settings = BoneConfig(r=4, variant=variant, mini_r=2, target_modules=["first", "second"])
    model = get_peft_model(network("bat"), settings)
    randomize(model)
    save(model, "bat", tmp_path)
    with pytest.raises(AssertionError, match="size mismatch"):
        old_peft.run(SCRIPT, "read", tmp_path)


def test_faults_that_are_right_here(tmp_path):
    """`test_faults_of_peft.py` has the same cases for this package."""
    old_peft.run(SCRIPT, "faults", tmp_path)
