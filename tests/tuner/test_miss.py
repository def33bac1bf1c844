"""`accelerate_miss`: the same model, before and after, for every kind of MiSS adapter."""

import copy

import pytest
import torch
from adapted_models import IDS, base_model, logits
from conftest import llama
from peft import LoraConfig, MissConfig, PeftModel, get_peft_model
from peft.tuners.miss.layer import MissLinear

import bonetune
from bonetune import accelerate_miss
from bonetune.errors import TargetError

KINDS = [True, "bat", "mini"]


def miss(kind=True, base=None, **changes):
    """A model with a MiSS adapter at random values: PEFT can start only its first kind at such."""
    torch.manual_seed(1)
    settings = {"r": 4, "mini_r": 2, "init_weights": kind, "target_modules": "all-linear"} | changes
    return randomized(get_peft_model(base or base_model(), MissConfig(**settings))).eval()


@torch.no_grad()
def randomized(model):
    for name, parameter in model.named_parameters():
        if "miss_block" in name:
            parameter.normal_(std=0.05)
    return model.to(next(p for n, p in model.named_parameters() if "base_layer" in n).dtype)


def backward(model):
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_same_function_and_gradients(kind):
    model = miss(kind)
    expected, gradients = logits(model), backward(model)
    linear_layers = sum(isinstance(m, MissLinear) for m in model.modules())
    assert accelerate_miss(model) == linear_layers
    torch.testing.assert_close(logits(model), expected)
    torch.testing.assert_close(backward(model), gradients)
    assert accelerate_miss(model) == 0
    assert len(gradients) == linear_layers


def test_it_is_ours_that_runs(monkeypatch):
    model = miss()
    accelerate_miss(model)
    monkeypatch.setattr(MissLinear, "forward", None)
    assert logits(model).isfinite().all()


def test_ragged_shards():
    model = miss(r=5)
    expected = logits(model)
    accelerate_miss(model)
    torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_several_active_adapters(kind):
    model = miss(kind)
    model.add_adapter("second", MissConfig(r=2, mini_r=4, init_weights=kind, target_modules="all-linear"))
    model.base_model.set_adapter(["default", "second"])
    randomized(model)
    expected = logits(model)
    accelerate_miss(model)
    torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_disabled_merged_and_unmerged(kind):
    model = miss(kind)
    expected, merged = logits(model), copy.deepcopy(model).merge_and_unload()
    accelerate_miss(model)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(base_model()))
    model.merge_adapter()
    torch.testing.assert_close(logits(model), logits(merged))
    model.unmerge_adapter()  # PEFT inverts in float32
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_pefts(kind, tmp_path):
    model = miss(kind)
    accelerate_miss(model)
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(base_model(), tmp_path).double().eval()
    torch.testing.assert_close(logits(reloaded), logits(model))


def test_dropout_is_pefts():
    model = miss(miss_dropout=0.5)
    without = logits(model)
    model.train()
    torch.manual_seed(0)
    expected = logits(model)
    accelerate_miss(model)
    torch.manual_seed(0)
    torch.testing.assert_close(logits(model), expected)
    assert not torch.allclose(expected, without)


@pytest.mark.parametrize("bias", [True, False])
def test_bat_computes_in_the_wider_dtype_as_pefts_does(bias):
    layer = torch.nn.Sequential(torch.nn.Linear(16, 8, bias=bias).bfloat16())
    model = randomized(get_peft_model(layer, MissConfig(r=4, init_weights="bat", target_modules=["0"]))).float()
    model.base_model.model[0].base_layer.bfloat16()
    x = torch.randn(20, 16)
    expected = model(x)
    accelerate_miss(model)
    assert torch.equal(model(x), expected)


def test_a_float32_base_costs_no_further_product():
    model = miss("bat", base=llama())
    accelerate_miss(model)
    layer = next(m for m in model.modules() if isinstance(m, MissLinear))
    assert not layer._updates(torch.zeros(1, layer.in_features))[0].exact
    layer.base_layer.bfloat16()
    assert layer._updates(torch.zeros(1, layer.in_features).bfloat16())[0].exact


@pytest.mark.parametrize("kind", KINDS)
def test_over_bfloat16_it_is_no_worse_than_peft(kind):
    """Float32 adapters over a bfloat16 base, against float64: PEFT computes these updates in float32."""
    wide, narrow = llama().double(), llama().bfloat16()
    wide.load_state_dict({name: tensor.double() for name, tensor in narrow.state_dict().items()})
    torch.manual_seed(1)
    model = get_peft_model(narrow, MissConfig(r=4, mini_r=2, init_weights=kind, target_modules="all-linear")).eval()
    exact = get_peft_model(wide, MissConfig(r=4, mini_r=2, init_weights=kind, target_modules="all-linear")).eval()
    with torch.no_grad():
        for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
            if "miss_block" in name:
                q.copy_(p.normal_(std=0.02))
    expected, before = logits(exact.double()), logits(model)
    accelerate_miss(model)
    after = logits(model)
    assert after.dtype == before.dtype
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "miss_block" in n)
    error = torch.linalg.norm(after.double() - expected) / torch.linalg.norm(expected)
    assert error <= 1.5 * torch.linalg.norm(before.double() - expected) / torch.linalg.norm(expected)


def test_under_autocast_the_dtype_is_pefts():
    model = miss(base=llama())
    with torch.autocast("cpu", torch.bfloat16):
        before = model(IDS).logits
        accelerate_miss(model)
        after = model(IDS).logits
    assert after.dtype == before.dtype
    torch.testing.assert_close(after, before, rtol=0.05, atol=0.05)


def test_a_model_without_miss_is_refused():
    with pytest.raises(TargetError, match="no MiSS layer"):
        bonetune.accelerate_miss(get_peft_model(base_model(), LoraConfig(target_modules="all-linear")))


def test_an_adapter_of_another_kind_on_the_same_layers_is_left_to_peft():
    """PEFT goes by the kind of a layer's first adapter, and the sum is then an error or another function."""
    model = miss(True)
    model.add_adapter("second", MissConfig(r=4, mini_r=1, init_weights="mini", target_modules="all-linear"))
    model.set_adapter("second")
    randomized(model)
    expected = logits(model)  # PEFT broadcasts the single column over out
    accelerate_miss(model)
    torch.testing.assert_close(logits(model), expected)
