"""Run under the PEFT at hand: `python peft_files.py write|read FOLDER NAME...`.

`write` leaves adapters with their outputs; `read` loads adapters, whoever wrote them, and compares their outputs with those.
Needs torch, peft and safetensors alone, so that every environment can import it.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

# name: (configuration, sizes of the layers, what else it says); no layer is square
CASES = {
    "bone": ("BoneConfig", (24, 16, 8), {"init_weights": True}),
    "bone-ragged": ("BoneConfig", (25, 18, 7), {"init_weights": True}),
    "bat": ("BoneConfig", (24, 16, 8), {"init_weights": "bat"}),
    "bone-whole": ("BoneConfig", (24, 16, 8), {"init_weights": True, "modules_to_save": ["head"]}),
    "miss": ("MissConfig", (24, 16, 8), {"init_weights": True}),
    "miss-ragged": ("MissConfig", (25, 18, 7), {"init_weights": True}),
    "miss-bat": ("MissConfig", (24, 16, 8), {"init_weights": "bat"}),
    "miss-mini": ("MissConfig", (24, 16, 8), {"init_weights": "mini", "mini_r": 2}),
    "miss-mini-ragged": ("MissConfig", (25, 18, 6), {"init_weights": "mini", "mini_r": 3}),
    "miss-whole": ("MissConfig", (24, 16, 8), {"init_weights": True, "modules_to_save": ["head"]}),
}
R = 4


class Network(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.first = nn.Linear(sizes[0], sizes[1])
        self.second = nn.Linear(sizes[1], sizes[2])
        self.head = nn.Linear(sizes[2], 5)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def network(name):
    torch.manual_seed(0)
    return Network(CASES[name][1])


def inputs(name):
    return torch.randn(9, CASES[name][1][0], generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def train(model):
    """Other values for all that trains."""
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(torch.randn_like(parameter) / 3)


@torch.no_grad()
def main(mode, folder, names):
    import peft

    for name in names:
        kind, _, settings = CASES[name]
        if mode == "write":
            config = getattr(peft, kind)(r=R, target_modules=["first", "second"], **settings)
            model = peft.get_peft_model(network(name), config)
            train(model)
            model.save_pretrained(folder / name)
            save_file({"y": model.eval()(inputs(name))}, folder / f"{name}.safetensors")
        else:
            model = peft.PeftModel.from_pretrained(network(name), str(folder / name)).eval()
            expected = load_file(folder / f"{name}.safetensors")["y"]
            torch.testing.assert_close(model(inputs(name)), expected, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
