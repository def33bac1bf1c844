"""Files of PEFT's own Bone and MiSS, with PEFT 0.18.1 and this environment's at the other end."""

import json
import shutil
import sys
from pathlib import Path

import old_peft
import pytest
import torch
from formats.peft_files import CASES, R, inputs, network
from safetensors.torch import load_file

from bonetune.formats import bone, miss
from bonetune.ops.reference import Update, merge

SCRIPT = Path(__file__).with_name("peft_files.py")
BONE = [name for name in CASES if name.startswith("b")]
MISS = [name for name in CASES if name.startswith("miss")]
# PEFT 0.21 has no Bone.
ENDS = {"0.18.1": (old_peft.run, [*BONE, *MISS]), "here": (lambda *a: old_peft.run_under(sys.executable, *a), MISS)}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=ENDS)
def end(request):
    return ENDS[request.param]


@pytest.fixture(scope="module")
def written(end, tmp_path_factory):
    """The folder into which that PEFT wrote its adapters."""
    run, names = end
    folder = tmp_path_factory.mktemp("written")
    run(SCRIPT, "write", folder, *names)
    return folder


def read(folder, name):
    return (bone if CASES[name][0] == "BoneConfig" else miss).read(folder / name)


@torch.no_grad()
def outputs(state, name):
    """Of the network with the adapter merged by its equations."""
    model = network(name)
    weights = model.state_dict()
    for parameter, tensor in state.whole.items():
        weights[parameter] = tensor
    for layer, tensor in state.tensors.items():
        weights[f"{layer}.weight"] = merge(weights[f"{layer}.weight"], [Update(tensor, state.spec(layer))])
    model.load_state_dict(weights)
    return model(inputs(name))


def assert_same_outputs(state, name, folder):
    expected = load_file(folder / f"{name}.safetensors")["y"]
    assert (network(name)(inputs(name)) - expected).abs().max() > 0.1
    torch.testing.assert_close(outputs(state, name), expected, rtol=1e-5, atol=1e-6)


def test_what_peft_wrote_is_read(end, written):
    for name in end[1]:
        state = read(written, name)
        variant = CASES[name][2]["init_weights"]
        assert state.config.variant == ("bone" if variant is True else variant), name
        assert state.config.r == R
        assert set(state.tensors) == {"first", "second"}
        assert bool(state.whole) == name.endswith("whole"), name
        assert_same_outputs(state, name, written)


@pytest.mark.parametrize("to", [bone, miss])
def test_what_is_written_is_read_by_peft(end, written, tmp_path, to):
    run, names = end
    if to is bone:
        # 0.18.1's Bone has no mini
        names = [name for name in names if "mini" not in name]
    for name in names:
        to.write(read(written, name), tmp_path / name)
        assert_same_outputs(to.read(tmp_path / name), name, written)
        shutil.copy(written / f"{name}.safetensors", tmp_path)
    if to is bone and run is not old_peft.run:
        return
    run(SCRIPT, "read", tmp_path, *names)


def test_files_of_november_2024(end, written, tmp_path):
    """PEFT's development version of that month wrote bat as `init_weights: true` with three-dimensional blocks."""
    if "bat" not in end[1]:
        pytest.skip("no Bone there")
    shutil.copytree(written / "bat", tmp_path / "bat")
    config = json.loads((tmp_path / "bat" / "adapter_config.json").read_text())
    assert config["init_weights"] == "bat"
    (tmp_path / "bat" / "adapter_config.json").write_text(json.dumps(config | {"init_weights": True}))
    state = bone.read(tmp_path / "bat")
    assert "November 2024" in " ".join(state.notes)
    assert_same_outputs(state, "bat", written)
