"""The choice of a backend reaches the layers, and what a layer cannot do is an error."""

import pytest
import torch
from peft import MissConfig, get_peft_model
from torch import nn

from bonetune import BoneConfig, accelerate_miss, set_backend
from bonetune.errors import InputError

pytest.importorskip("triton", reason="the kernels need Triton: pip install 'bonetune[triton]'")


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 48))


def outputs(adapted, backend, **kwargs):
    assert set_backend(adapted, backend) == 2
    return adapted(torch.linspace(-1, 1, 40 * 48).reshape(40, 48), **kwargs)


@pytest.mark.parametrize("variant", ["bone", "bat", "bat-row", "bat-left"])
def test_layers_compute_the_same_by_either(variant):
    config = BoneConfig(r=16, variant=variant, target_modules=["0", "2"], init_weights=False)
    adapted = get_peft_model(model(), config)
    torch.testing.assert_close(outputs(adapted, "triton"), outputs(adapted, "torch"), rtol=1e-5, atol=1e-5)
    assert torch.equal(outputs(adapted, "auto"), outputs(adapted, "torch"))  # on a CPU


def test_miss_layers_are_told_too():
    adapted = get_peft_model(model(), MissConfig(r=16, target_modules=["0", "2"], init_weights=False))
    accelerate_miss(adapted)
    torch.testing.assert_close(outputs(adapted, "triton"), outputs(adapted, "torch"), rtol=1e-5, atol=1e-5)


def test_rows_of_several_adapters():
    adapted = get_peft_model(model(), BoneConfig(r=16, target_modules=["0", "2"], init_weights=False), "first").eval()
    adapted.add_adapter("second", BoneConfig(r=16, target_modules=["0", "2"], init_weights=False))
    names = ["first", "second", "__base__", "second"] * 10
    with torch.no_grad():
        by_kernels, by_torch = (outputs(adapted, b, adapter_names=names) for b in ("triton", "torch"))
    torch.testing.assert_close(by_kernels, by_torch, rtol=1e-5, atol=1e-5)


def test_an_unknown_backend_is_named_and_an_impossible_one_explained():
    adapted = get_peft_model(model(), BoneConfig(r=8, target_modules=["0", "2"]))
    with pytest.raises(InputError, match="'cuda'"):
        set_backend(adapted, "cuda")
    with pytest.raises(InputError, match="r of 16, 32, 64, 128, not 8"):
        outputs(adapted, "triton")
