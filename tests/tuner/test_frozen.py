"""When the product may be made without calling the base layer, and that a called layer's output stays its own."""

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations

from bonetune import VARIANTS, BoneLinear, ShardSpec
from bonetune.tuner.frozen import FrozenBase


def layer(variant="bone", base=None):
    torch.manual_seed(0)
    base = (base or nn.Linear(8, 12)).double().requires_grad_(False)
    adapted = BoneLinear(base)
    adapted.update_layer("default", ShardSpec(variant, 4, 3), zeros=False)
    adapted.set_adapter(["default"])
    return adapted.double()


def is_plain(base):
    return FrozenBase(layer(base=base), (), {}).plain


def with_hook(register):
    base = nn.Linear(8, 12)
    getattr(base, register)(lambda *_: None)
    return base


def test_a_linear_layer_is_plain():
    assert is_plain(nn.Linear(8, 12))
    assert is_plain(nn.Linear(8, 12, bias=False))


@pytest.mark.parametrize(
    "base",
    [
        type("Subclass", (nn.Linear,), {})(8, 12),
        with_hook("register_forward_hook"),
        with_hook("register_forward_pre_hook"),
        with_hook("register_full_backward_hook"),
        parametrizations.weight_norm(nn.Linear(8, 12)),
    ],
    ids=["subclass", "hook", "pre-hook", "backward hook", "parametrized"],
)
def test_other_layers_are_called(base):
    assert not is_plain(base)


def test_a_layer_with_a_forward_of_its_own_is_called():
    adapted = layer()
    adapted.base_layer.forward = adapted.base_layer.forward
    assert not FrozenBase(adapted, (), {}).plain


def test_a_trained_layer_and_further_arguments():
    adapted = layer()
    assert not FrozenBase(adapted, (1,), {}).plain
    adapted.base_layer.bias.requires_grad_()
    assert not FrozenBase(adapted, (), {}).plain


def test_global_hooks_see_the_base_layer():
    adapted, seen = layer(), []
    handle = register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        adapted(torch.randn(5, 8, dtype=torch.float64))
    finally:
        handle.remove()
    assert adapted.base_layer in seen


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_a_hook_recorded_or_returned_is_not_written_to(variant):
    x = torch.randn(20, 8, dtype=torch.float64)
    expected = layer(variant)(x)
    adapted, recorded = layer(variant), []
    adapted.base_layer.register_forward_hook(lambda _, __, y: recorded.append(y))
    torch.testing.assert_close(adapted(x), expected)
    base = adapted.base_layer
    if variant in ("bone", "mini", "bat", "bat-left"):
        torch.testing.assert_close(recorded[0], nn.functional.linear(x, base.weight, base.bias))
    held = torch.ones(20, 12, dtype=torch.float64)
    adapted.base_layer.register_forward_hook(lambda *_: held)
    adapted(x)
    assert held.eq(1).all()


@pytest.mark.parametrize("hook", [torch.Tensor.sigmoid, lambda y: y.T.contiguous().T])
@pytest.mark.parametrize("variant", ["bone", "mini", "bat-row", "bat-free"])
def test_base_layers_that_keep_or_transpose_what_they_return(variant, hook):
    adapted = layer(variant)
    adapted.base_layer.register_forward_hook(lambda _, __, y: hook(y))
    x = torch.randn(20, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: adapted(x), (x,))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's tracer does it itself
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_whole(variant):
    for adapted in (layer(variant), layer(variant).train()):
        if adapted.training:
            adapted.base_layer.bias.requires_grad_()  # so that the layer is called
        x = torch.randn(20, 8, dtype=torch.float64, requires_grad=True)
        torch.compiler.reset()
        compiled = torch.compile(adapted, fullgraph=True, backend="aot_eager")
        expected, y = adapted(x), compiled(x)
        torch.testing.assert_close(y, expected)
        theta = adapted.bone_block["default"]
        want, got = (torch.autograd.grad(out.square().sum(), [x, theta]) for out in (expected, y))
        torch.testing.assert_close(got, want)
