"""Run under PEFT 0.18.1, the last release with a Bone of its own: `python peft_018.py write|read|faults FOLDER`.

`write` leaves adapters with their inputs and outputs for bonetune to reproduce; `read` loads adapters that bonetune wrote;
`faults` shows what was wrong in it and is right in bonetune. Needs torch, peft and safetensors alone, so that both
environments can import it.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

# name: (sizes of the layers, r, old init_weights)
CASES = {
    "bone": ((24, 16, 8), 4, True),
    "bone-ragged": ((25, 18, 7), 4, True),
    "bat": ((24, 16, 8), 4, "bat"),
}


class Network(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.first = nn.Linear(sizes[0], sizes[1])
        self.second = nn.Linear(sizes[1], sizes[2])

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def network(name):
    torch.manual_seed(0)
    return Network(CASES[name][0])


def inputs(name):
    return torch.randn(5, CASES[name][0][0], generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def randomize(model):
    torch.manual_seed(2)
    for parameter_name, parameter in model.named_parameters():
        if "bone_" in parameter_name:
            parameter.copy_(torch.randn_like(parameter) / 3)


@torch.no_grad()
def save(model, name, folder):
    model.save_pretrained(folder / name)
    save_file({"y": model.eval()(inputs(name))}, folder / f"{name}.safetensors")


def show_faults(peft):
    """A refused merge that has changed the weight; an r that is accepted and fails at the merge."""
    model = peft.get_peft_model(network("bone-ragged"), peft.BoneConfig(r=4, target_modules=["first"]))
    first = model.base_model.model.first
    first.bone_block["default"].data[0, 0] = torch.nan
    try:
        model.merge_adapter(safe_merge=True)
    except ValueError:
        assert first.base_layer.weight.isnan().any()
    else:
        raise AssertionError("safe_merge took NaN")
    model = peft.get_peft_model(network("bone"), peft.BoneConfig(r=30, target_modules=["first"]))
    try:
        model.merge_adapter()
    except RuntimeError:  # of shapes
        pass
    else:
        raise AssertionError("r=30 was merged into 24 columns")


def main(mode, folder):
    import peft

    assert peft.__version__ == "0.18.1", peft.__version__
    if mode == "faults":
        show_faults(peft)
        return
    for name, (_, r, init) in CASES.items():
        if not (folder / name).exists() and mode == "read":
            continue
        if mode == "write":
            config = peft.BoneConfig(r=r, init_weights=init, target_modules=["first", "second"])
            model = peft.get_peft_model(network(name), config)
            randomize(model)
            save(model, name, folder)
        else:
            model = peft.PeftModel.from_pretrained(network(name), str(folder / name)).eval()
            expected = load_file(folder / f"{name}.safetensors")["y"]
            with torch.no_grad():
                torch.testing.assert_close(model(inputs(name)), expected, rtol=1e-6, atol=1e-6)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
