"""Small RWKV models with weights of which each matters, and their files."""

import torch

from bonetune.rwkv import RwkvConfig, RwkvForCausalLM, save_pth

VERSIONS = ("x060", "x070")
RANKS = {"x060": {"maa": 4, "decay": 6}, "x070": {"w": 4, "a": 5, "v": 3, "g": 6}}


def config(version, **changes):
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "head_size": 8, "ranks": RANKS[version]}
    return RwkvConfig(version=version, **(sizes | changes))


def model(version, seed=0, **changes):
    torch.manual_seed(seed)
    made = RwkvForCausalLM(config(version, **changes)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def file(path, version, dtype=torch.float32, seed=0, **changes):
    save_pth(model(version, seed, **changes).to(dtype), path)
    return path
