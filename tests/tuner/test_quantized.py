"""Quantized layers on the CPU: bitsandbytes int8 and nf4, torchao int8 and int4, and layers that cannot be dequantized."""

import json
import re
import statistics
from types import SimpleNamespace

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from adapted_models import IDS, config, logits
from conftest import llama
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from bonetune import VARIANTS, BoneLayer, TargetError
from bonetune.ops import apply, merge
from bonetune.tuner.dequantize import dequantize_layers

bitsandbytes = pytest.importorskip("bitsandbytes")
torchao = pytest.importorskip("torchao")
ao = pytest.importorskip("torchao.quantization")

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
KINDS = {
    "int8": BitsAndBytesConfig(load_in_8bit=True),
    "nf4": BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=torch.float32),
    "nf4 double": BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_use_double_quant=True),
    "torchao int8": TorchAoConfig(ao.Int8WeightOnlyConfig(set_inductor_config=False)),
    "torchao int4": TorchAoConfig(ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(32))),
}
# What quantizing again may move W' by, in relation to W': the root mean square of half a step at most.
REQUANTIZED = {"int8": 0.012, "nf4": 0.13, "nf4 double": 0.13, "torchao int8": 0.012, "torchao int4": 0.13}
QUIET = pytest.mark.filterwarnings("ignore:.*quantized again", "ignore:.*additionally merging")
every_kind = pytest.mark.parametrize("kind", KINDS)
every_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama whose weights can be quantized in groups of 64, with biases."""
    folder = tmp_path_factory.mktemp("model")
    llama(hidden_size=64, intermediate_size=128, attention_bias=True).save_pretrained(folder)
    return folder


@pytest.fixture
def load(folder):
    return lambda kind, dtype=torch.float32: AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=KINDS[kind], dtype=dtype
    ).eval()


def adapted(base, variant, **changes):
    """Some layers only, so that others stay quantized without an adapter; updates of about the size of W."""
    torch.manual_seed(1)
    model = get_peft_model(base, config(variant, **({"r": 8, "target_modules": ["q_proj", "k_proj", "down_proj"]} | changes)))
    for layer in bone_layers(model):
        layer.bone_block["default"].data.mul_(0.3)
    return model.eval()


def bone_layers(model):
    return [module for module in model.modules() if isinstance(module, BoneLayer)]


def with_values(layer):
    """The adapters' updates in float64."""
    return [u._replace(theta=u.theta.detach().double().requires_grad_()) for u in layer.updates(layer.active_adapters)]


def error(got, want):
    """Relative, in the Frobenius norm."""
    return (torch.linalg.norm(got.double() - want.double()) / torch.linalg.norm(want.double())).item()


def contents(model):
    """Codes, scales and settings, by where they are found."""
    logits(model)  # bitsandbytes moves its codes at the first call
    found = {"": repr(model)}
    for key, value in model.state_dict().items():
        if "layers" in key and "bone" not in key:
            parts = value.tensor_data_names if isinstance(value, torchao.utils.TorchAOBaseTensor) else []
            found[key] = [getattr(value, part).tolist() for part in parts] or value.tolist()
    for name, parameter in model.named_parameters():
        found[f"{name} is quantized"] = getattr(parameter, "bnb_quantized", None)
    return found


@every_kind
@every_variant
@pytest.mark.parametrize(("dtype", "training"), [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)])
def test_forward_and_gradients_are_those_of_the_equations(load, kind, variant, dtype, training):
    model = adapted(load(kind, dtype), variant, target_modules=["q_proj"], layers_to_transform=[0]).train(training)
    (layer,) = bone_layers(model)
    W, (update,), bias = layer.get_base_weight().double(), with_values(layer), layer.base_layer.bias.double()
    x = torch.randn(2, 10, 64, dtype=dtype, requires_grad=True)
    dy, wide = torch.randn(2, 10, 64, dtype=dtype), x.detach().double().requires_grad_()
    y, expected = layer(x), apply(wide, W, [update], bias)
    gradients = torch.autograd.grad(y, [x, layer.bone_block["default"]], dy)
    wanted = torch.autograd.grad(expected, [wide, update.theta], dy.double())
    # int8 rounds x to codes in evaluation, and the compute dtype of "nf4 double" is bfloat16: the base layer's own error
    rounds_x = kind == "nf4 double" or (kind == "int8" and not training)
    own = error(layer.base_layer(x), apply(wide, W, [], bias)) if rounds_x else 0
    assert own < 0.01
    bound = 2 * own + (1e-6 if dtype == torch.float32 else 2**-7)
    assert error(y, expected) < bound
    assert error(gradients[0], wanted[0]) < bound
    assert error(gradients[1], wanted[1]) < bound
    with torch.no_grad():
        assert error(layer(x), expected) < bound
    assert y.dtype == gradients[0].dtype == dtype


def trained_on(model, loss):
    optimizer, losses = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2), []
    for _ in range(3):
        losses.append(loss())
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return [each.item() for each in losses]


@every_kind
@every_variant
def test_training_saving_and_loading(load, kind, variant, tmp_path):
    model = adapted(load(kind), variant, init_weights=True)
    before = contents(model)

    def loss():
        logits(model.eval())  # evaluating in between costs no gradients
        return model.train()(IDS, labels=IDS).loss

    first, second, third = trained_on(model, loss)
    assert third < second < first
    trained = logits(model.eval())
    assert contents(model) == before
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(load(kind), tmp_path)), trained)


@QUIET
@every_kind
@every_variant
def test_merging_requantizes_and_unmerging_restores_every_bit(load, kind, variant):
    model = adapted(load(kind), variant)
    layers, expected, before = bone_layers(model), logits(model), contents(model)
    with model.disable_adapter():
        without = logits(model)
    frozen = [layer.get_base_weight() for layer in layers]
    with pytest.warns(UserWarning, match="6 merged layers were quantized again") as caught:
        model.merge_adapter()
    merged, shares = [layer.get_base_weight() for layer in layers], []
    for layer, W, changed in zip(layers, frozen, merged, strict=True):
        wanted = merge(W, layer.updates(["default"]))
        assert error(changed, wanted) < REQUANTIZED[kind]
        shares.append(error(changed - W, wanted - W))
    (said,) = re.findall(r"by (\S+) times", str(caught[0].message))
    assert float(said) == pytest.approx(statistics.median(shares), rel=0.06)
    assert 0 < error(logits(model), expected) < 0.8 * error(without, expected)
    model.unmerge_adapter()
    assert contents(model) == before
    assert torch.equal(logits(model), expected)
    model.to("cpu")  # a layer that took its codes for values would quantize them now
    assert contents(model) == before
    quantized = model.merge_and_unload()
    assert not bone_layers(quantized)
    for layer, changed in zip(layers, merged, strict=True):
        assert any(module is layer.base_layer for module in quantized.modules())
        assert torch.equal(layer.get_base_weight(), changed)


@QUIET
@every_kind
def test_several_adapters_merge_in_any_order(load, kind):
    model = adapted(load(kind), "bat")
    model.add_adapter("other", config("bone", r=8, target_modules=["q_proj", "up_proj"]))
    model.base_model.set_adapter(["default", "other"])
    before = contents(model)
    model.merge_adapter()
    both = [layer.get_base_weight() for layer in bone_layers(model)]
    model.unmerge_adapter()
    for names in (["default", "other"], ["other", "default"]):
        for name in names:
            model.merge_adapter([name])
        assert all(error(layer.get_base_weight(), W) < 0.03 for layer, W in zip(bone_layers(model), both, strict=True))
        model.unmerge_adapter()
        assert contents(model) == before


@every_kind
def test_a_merge_that_fails_leaves_everything_as_it_was(load, kind, monkeypatch):
    model = adapted(load(kind), "bat-row")
    before, layer = contents(model), bone_layers(model)[-1]
    theta = layer.bone_block["default"].data.view(-1)
    first, theta[0] = theta[0].item(), float("nan")
    for merge_into in (model.merge_adapter, layer.merge):
        with pytest.raises(ValueError, match="NaNs detected"):
            merge_into(safe_merge=True)
    theta[0] = first

    def fail(layer, weight):
        del layer.get_base_layer().weight
        raise RuntimeError("out of memory")

    layer = bone_layers(model)[0]
    monkeypatch.setattr(layer.quantization_backend, "set_base_weight", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.merge_adapter()
    assert not any(layer.merged for layer in bone_layers(model))
    assert contents(model) == before


@every_kind
@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantizing_gives_a_plain_model_that_says_the_same(load, kind, variant, dtype, tmp_path):
    model = adapted(load(kind, dtype), variant)
    expected = logits(model.train())  # in evaluation int8 would round x
    plain = model.eval().merge_and_unload(dequantize=True)
    exact = dtype == torch.float32 and kind != "nf4 double"
    assert error(logits(plain), expected) < (1e-5 if exact else 0.05)
    linear = [module for module in plain.modules() if isinstance(module, nn.Linear)]
    assert {type(module) for module in linear} == {nn.Linear}
    assert {(type(module.weight), module.weight.dtype) for module in linear} == {(nn.Parameter, dtype)}
    assert len(linear) == 15
    plain.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == dtype
    assert torch.equal(logits(again), logits(plain))
    assert plain.to(torch.float64).dtype == torch.float64  # which transformers refuses to a quantized model
    assert not bone_layers(plain)


@every_kind
@every_variant
def test_no_dequantized_weight_is_kept_for_backward(load, kind, variant):
    """Beyond what the base layer itself keeps: torchao keeps one for its own backward."""
    (layer,) = bone_layers(adapted(load(kind), variant, target_modules=["down_proj"], layers_to_transform=[0]).train())
    x, counts = torch.randn(2, 5, 128, requires_grad=True), []
    for called in (layer.base_layer, layer):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            called(x)
        counts.append(sum(t.numel() >= 64 * 128 and t.is_floating_point() for t in kept))
    assert counts[0] == counts[1] <= 1


@every_kind
@pytest.mark.parametrize("reentrant", [True, False])
def test_prepared_for_training_with_gradient_checkpointing(load, kind, reentrant):
    gradients = []
    for checkpointing in (False, True):
        base = prepare_model_for_kbit_training(
            load(kind, torch.bfloat16),
            use_gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        )
        model = adapted(base, "bat").train()
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append([layer.bone_block["default"].grad for layer in bone_layers(model)])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(checkpointed, plain)
    expected = logits(model.eval())
    assert error(logits(model.merge_and_unload(dequantize=True)), expected) < 0.05


@pytest.mark.parametrize("kind", ["nf4", "nf4 double"])
@every_variant
def test_codes_packed_for_avx512_are_laid_out_again(load, kind, variant):
    """On a CPU with AVX512-BF16 bitsandbytes packs them in evaluation; packed they are noise to whoever dequantizes them."""
    pack = bitsandbytes.functional._convert_weight_packed_for_cpu
    expected, base = adapted(load(kind), variant), load(kind)
    for module in base.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu, weight = True, module.weight
            weight.data, weight.quant_state = pack(weight.data, weight.quant_state)
    model = adapted(base, variant)
    for each in (model, expected):
        logits(each)
        each.train()(IDS, labels=IDS).loss.backward()
    for packed, layer in zip(bone_layers(model), bone_layers(expected), strict=True):
        assert error(packed.get_base_weight(), layer.get_base_weight()) < 2**-8
        assert error(packed.bone_block["default"].grad, layer.bone_block["default"].grad) < 0.05


@pytest.mark.parametrize("packing", ["plain", "preshuffled", "plain_int32", "tile_packed_to_4d", "opaque"])
def test_torchaos_int4_formats(packing):
    """Only the last can be made on a CPU. It has neither a backward nor a way back to values, so it can be served, no more."""
    settings = {"group_size": 32, "set_inductor_config": False}
    if packing == "opaque":
        setting = pytest.importorskip("torchao.prototype.quantization.int4").PrototypeInt4WeightOnlyConfig(**settings)
    else:
        setting = ao.Int4WeightOnlyConfig(int4_packing_format=packing, **settings)
    base = nn.Sequential(nn.Linear(64, 96)).bfloat16()
    base.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(get_apply_tensor_subclass=lambda: setting))
    try:
        ao.quantize_(base, setting)
    except (ImportError, NotImplementedError, AssertionError) as reason:
        pytest.skip(f"torchao {torchao.__version__}, int4 {packing} on a CPU: {reason}")
    bias, x = base[0].bias, torch.randn(3, 64).bfloat16()
    W = (base(torch.eye(64).bfloat16()) - bias).T
    with pytest.raises(TargetError, match=r"'bat' needs the weight's values.*use 'bat-row'"):
        adapted(base, "bat", target_modules=["0"])
    model = adapted(base, "bat-row", target_modules=["0"])
    expected = apply(x.double(), W.double(), with_values(*bone_layers(model)), bias.double())
    for refused in (model.merge_adapter, lambda: model.merge_and_unload(dequantize=True)):
        with pytest.raises((TypeError, NotImplementedError), match="Int4OpaqueTensor do not support dequantization"):
            refused()
    assert error(model(x), expected) < 0.02


class Codes(nn.Module):
    """A Linear of int8 codes, by a library of which PEFT knows nothing."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("qweight", torch.randint(-127, 128, (out_features, in_features), dtype=torch.int8))
        self.bias = nn.Parameter(torch.randn(out_features))

    def forward(self, x):
        return nn.functional.linear(x, self.qweight.to(x.dtype) / 500, None if self.bias is None else self.bias.to(x.dtype))


def network():
    torch.manual_seed(0)
    return nn.Sequential(Codes(16, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), Codes(24, 16))


class Replacing(ForwardOnlyQuantizationBackend):
    """As PEFT's for HQQ: a layer is quantized again by putting another in its place, without the bias."""

    def get_base_weight(self, base_layer):
        return base_layer.qweight / 500

    def set_base_weight(self, peft_layer, weight):
        peft_layer.base_layer = new = Codes(weight.shape[1], weight.shape[0])
        new.qweight, new.bias = (weight * 500).round().to(torch.int8), None


def resolve_codes_to(backend, monkeypatch):
    for module in ("targets", "layer", "dequantize"):
        resolve = f"bonetune.tuner.{module}.resolve_quantization_backend"
        monkeypatch.setattr(resolve, lambda layer, **_: backend if isinstance(layer, Codes) else None)


@QUIET
def test_a_backend_that_replaces_the_layer(monkeypatch):
    resolve_codes_to(Replacing("fake"), monkeypatch)
    model, x = adapted(network(), "bone", target_modules=["0", "4"]), torch.randn(5, 16)
    for layer in bone_layers(model):
        layer.bone_block["default"].data.mul_(0.02)
    expected, before = model(x), [layer.base_layer for layer in bone_layers(model)]
    model.merge_adapter()
    assert 0 < error(model(x), expected) < 0.02
    model.unmerge_adapter()
    assert torch.equal(model(x), expected)
    assert [layer.base_layer for layer in bone_layers(model)] == before
    assert error(model.merge_and_unload(dequantize=True)(x), expected) < 1e-6


@every_variant
def test_a_backend_that_only_runs_forward(variant, monkeypatch, tmp_path):
    resolve_codes_to(ForwardOnlyQuantizationBackend("fake"), monkeypatch)
    targets = {"target_modules": ["0", "2", "4"]}
    if variant == "bat":
        with pytest.raises(TargetError, match=r"'bat' needs the weight's values, which fake layers \(0\).*'bat-row'.*'bone'"):
            adapted(network(), variant, **targets)
        return
    model, x = adapted(network(), variant, **targets), torch.randn(5, 16)
    expected = x.double()
    for layer in bone_layers(model):
        stored = layer.base_layer.weight if layer.quantization_backend is None else layer.base_layer.qweight / 500
        expected = apply(expected.tanh(), stored.double(), with_values(layer), layer.base_layer.bias.double())
    assert error(model(x.tanh()), expected) < 1e-6
    first, second, third = trained_on(model, lambda: model(x).square().mean())
    assert third < second < first
    trained = model(x)
    for refused in (model.merge_adapter, lambda: model.merge_and_unload(dequantize=True)):
        with pytest.raises(TypeError, match=r"[Dd]equantiz.* fake|fake.* (cannot|not)"):
            refused()
        assert not any(layer.merged for layer in bone_layers(model))
    assert torch.equal(model(x), trained)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(network(), tmp_path)(x), trained)


def test_dequantizing_shared_and_hooked_layers(load):
    layer = load("int8").model.layers[0].self_attn.q_proj
    add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu"))
    model = nn.ModuleDict({"one": layer, "two": nn.ModuleList([layer])})
    (plain,) = dequantize_layers(model)
    assert model["one"] is model["two"][0] is plain
    assert type(plain._hf_hook) is AlignDevicesHook
