"""Adapted tiny Llamas and what they say, for the tests of the tuner."""

import torch
from conftest import llama
from peft import get_peft_model

from bonetune import BoneConfig, BoneLayer
from bonetune.ops import Update, merge

IDS = torch.arange(2, 26).reshape(2, 12)


def config(variant="bone", **changes):
    settings = {"r": 4, "variant": variant, "mini_r": 2, "target_modules": "all-linear", "init_weights": False}
    return BoneConfig(**(settings | changes))


def base_model(**changes):
    """In float64, so that what is compared is the formula and not its rounding."""
    return llama(**changes).double()


def adapted(variant="bone", base=None, **changes):
    torch.manual_seed(1)
    base = base or base_model()
    model = get_peft_model(base, config(variant, **changes)).eval()
    return model.double() if base.dtype == torch.float64 else model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@torch.no_grad()
def by_the_equations(model, adapters):
    """A plain model with W' in place of W, from `ops.merge` in float64."""
    plain = base_model()
    for name, layer in model.named_modules():
        if isinstance(layer, BoneLayer):
            updates = [Update(layer.bone_block[a].double(), layer.bone_spec[a]) for a in adapters if a in layer.bone_block]
            target = plain.get_submodule(name.removeprefix("base_model.model."))
            target.weight.copy_(merge(target.weight, updates))
    return plain


def assert_follows_the_equations(model, adapters=("default",)):
    torch.testing.assert_close(logits(model), logits(by_the_equations(model, adapters)))
