"""What large models need: tensors without values, layers kept elsewhere, compilation, narrow arithmetic."""

import shutil
import warnings

import pytest
import torch
from accelerate import dispatch_model, init_empty_weights
from adapted_models import IDS, adapted, base_model, config, logits
from conftest import llama
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM

from bonetune import VARIANTS, BoneLayer, BoneLinear, InputError, ShardSpec, TargetError

BIASES = {"attention_bias": True, "mlp_bias": True}


def blocks(model):
    return {name: p for name, p in model.named_parameters() if "bone_block" in name}


class TestWithoutValues:
    """Models and adapters on the meta device, which get their values later."""

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_an_adapter_made_without_values_and_given_them(self, variant):
        trained = adapted(variant, llama())
        model = get_peft_model(llama(), config(variant), low_cpu_mem_usage=True).eval()
        assert {p.device.type for p in blocks(model).values()} == {"meta"}
        assert not any(p.is_meta for name, p in model.named_parameters() if "bone_block" not in name)
        set_peft_model_state_dict(model, get_peft_model_state_dict(trained), low_cpu_mem_usage=True)
        assert torch.equal(logits(model), logits(trained))
        assert all(p.requires_grad for p in blocks(model).values())

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_a_second_adapter_loaded_without_values_first(self, variant, tmp_path):
        trained = adapted(variant, llama())
        trained.save_pretrained(tmp_path)
        model = adapted("bone", llama(), r=2)
        model.load_adapter(tmp_path, "other", low_cpu_mem_usage=True)
        model.set_adapter("other")
        assert torch.equal(logits(model), logits(trained))

    def test_injected_without_values(self):
        trained = adapted("bat", llama())
        model = inject_adapter_in_model(config("bat"), llama(), low_cpu_mem_usage=True)
        set_peft_model_state_dict(model, get_peft_model_state_dict(trained), low_cpu_mem_usage=True)
        assert torch.equal(logits(model), logits(trained))

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_an_adapter_without_values_is_named_not_computed_with(self, variant):
        """torch's products of real and meta tensors can return whatever is in memory."""
        model = get_peft_model(llama(), config(variant), low_cpu_mem_usage=True)
        with pytest.raises(InputError, match=r"default has no values.*low_cpu_mem_usage"):
            model(IDS)
        with pytest.raises(InputError, match=r"default cannot be merged"):
            model.merge_adapter()

    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("assign", [True, False], ids=["assign", "to_empty"])
    def test_a_base_model_adapted_before_it_has_values(self, variant, assign):
        trained = adapted(variant)
        state = trained.state_dict()
        with init_empty_weights():
            empty = llama().double()
        model = get_peft_model(empty, config(variant)).eval()
        assert {p.device.type for p in model.parameters()} == {"meta"}
        assert {name: p.shape for name, p in model.state_dict().items()} == {name: p.shape for name, p in state.items()}
        if not assign:
            model.to_empty(device="cpu")
            for name, buffer in trained.named_buffers():  # not in the state dict: rotary frequencies
                model.get_buffer(name).copy_(buffer)
        model.load_state_dict(state, assign=assign)
        assert torch.equal(logits(model), logits(trained))
        model.train()(IDS, labels=IDS).loss.backward()
        assert all(p.grad is not None for p in blocks(model).values())
        plain = model.eval().merge_and_unload()
        torch.testing.assert_close(logits(plain), logits(trained))

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_shapes_are_computed_without_values(self, variant):
        with torch.device("meta"):
            model = get_peft_model(llama(), config(variant))
        output = model(IDS.to("meta"), labels=IDS.to("meta"))
        output.loss.backward()
        assert output.logits.shape == (*IDS.shape, 320)
        assert all(p.grad.shape == p.shape for p in blocks(model).values())


PARTS = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]


def one_device(model):
    return {"": "cpu"}


def decoder_layer_on_disk(model):
    """With its adapters, as in a `device_map` for decoder layers."""
    return {f"base_model.model.{part}": "disk" if part == "model.layers.1" else "cpu" for part in PARTS}


def base_layers_on_disk(model):
    """Without their adapters, which stay where they can be trained."""
    leaves = [name for name, module in model.named_modules() if not list(module.children()) or "bone_block" in name]
    return {name: "disk" if ".layers.1." in name and name.endswith(".base_layer") else "cpu" for name in leaves}


def is_offloaded(module):
    return any(p.is_meta for p in module.parameters())


@pytest.fixture
def dispatched(tmp_path):
    def dispatch(variant, plan, **settings):
        model = adapted(variant, base_model(**BIASES))
        # hooks also where there is a single device, as in a model that was loaded in 8 bits
        model = dispatch_model(model, plan(model), offload_dir=tmp_path / "offloaded", force_hooks=True, **settings)
        layers = [module for module in model.modules() if isinstance(module, BoneLayer)]
        assert any(hasattr(module, "_hf_hook") for layer in layers for module in layer.modules())
        assert sum(is_offloaded(layer) for layer in layers) == (0 if plan is one_device else len(layers) // 2)
        return model

    return dispatch


def expected_of(variant):
    return logits(adapted(variant, base_model(**BIASES)))


@pytest.mark.parametrize("plan", [one_device, decoder_layer_on_disk, base_layers_on_disk])
@pytest.mark.parametrize("variant", VARIANTS)
class TestDispatched:
    """Models whose layers accelerate brings to the device for their own forward alone."""

    def test_forward(self, dispatched, variant, plan):
        model, expected = dispatched(variant, plan), expected_of(variant)
        for _ in range(2):
            torch.testing.assert_close(logits(model), expected)
        with model.disable_adapter():
            torch.testing.assert_close(logits(model), logits(base_model(**BIASES)))

    def test_merge_and_unload(self, dispatched, variant, plan):
        plain = dispatched(variant, plan).merge_and_unload()
        assert not any(isinstance(module, BoneLayer) for module in plain.modules())
        torch.testing.assert_close(logits(plain), expected_of(variant))

    def test_merging_and_back(self, dispatched, variant, plan):
        model, expected = dispatched(variant, plan), expected_of(variant)
        before = logits(model)
        model.merge_adapter()
        torch.testing.assert_close(logits(model), expected)
        with model.disable_adapter():  # unmerges
            torch.testing.assert_close(logits(model), logits(base_model(**BIASES)))
        assert torch.equal(logits(model), before)
        model.merge_adapter()
        model.unmerge_adapter()
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("plan", [one_device, base_layers_on_disk])  # an adapter that is offloaded cannot be trained
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_a_dispatched_model(dispatched, variant, plan):
    model, plain = dispatched(variant, plan).train(), adapted(variant, base_model(**BIASES)).train()
    for each in (model, plain):
        each(IDS, labels=IDS).loss.backward()
    expected = blocks(plain)
    for name, p in blocks(model).items():
        torch.testing.assert_close(p.grad, expected[name].grad, rtol=1e-5, atol=1e-8, msg=name)


@pytest.mark.parametrize("variant", ["bone", "bat"])
def test_layers_that_preload_their_parts(dispatched, variant):
    """accelerate's own way for modules whose parts are not called; PEFT's merging does not know it."""
    model = dispatched(variant, decoder_layer_on_disk, preload_module_classes=["BoneLinear"])
    torch.testing.assert_close(logits(model), expected_of(variant))
    with pytest.raises(InputError, match="preload_module_classes"):
        model.merge_adapter()


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter in the checkpoint to a meta:UserWarning")  # PEFT
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapter_loaded_over_a_base_that_is_on_disk(tmp_path, monkeypatch, variant, low_cpu_mem_usage):
    monkeypatch.chdir(tmp_path)  # PEFT takes the files' absolute paths for relative ones when it writes its own
    trained = adapted(variant, llama(**BIASES))
    trained.save_pretrained(tmp_path / "adapter")
    llama(**BIASES).save_pretrained(tmp_path / "base")
    places = {part: "disk" if part == "model.layers.1" else "cpu" for part in PARTS}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map=places, offload_folder=tmp_path / "offloaded")
    model = PeftModel.from_pretrained(
        base,
        tmp_path / "adapter",
        device_map={f"base_model.model.{name}": place for name, place in places.items()},
        offload_dir=tmp_path / "offloaded again",
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
    assert any(p.is_meta for p in blocks(model).values())
    torch.testing.assert_close(logits(model), logits(trained), rtol=1e-5, atol=3e-5)  # CPUs sum in orders of their own
    torch.testing.assert_close(logits(model.merge_and_unload()), logits(trained), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_under_autocast(variant):
    """Of the size and in the direction of float32's, for updates that are small beside the weights, as in training."""
    gradients = []
    for narrow in (False, True):
        model = adapted(variant, llama()).train()
        for p in blocks(model).values():
            p.data.mul_(0.1)
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            loss = model(IDS, labels=IDS).loss
        loss.backward()
        gradients.append({name: p.grad for name, p in blocks(model).items()})
    for name, expected in gradients[0].items():
        assert (gradients[1][name] - expected).norm() < 0.1 * expected.norm(), name


def layer(variant, called=False):
    """`called`: the base layer is called, instead of its product being computed together with the update."""
    torch.manual_seed(0)
    adapted = BoneLinear(nn.Linear(16, 24).requires_grad_(False))
    adapted.update_layer("default", ShardSpec(variant, 4, 3), zeros=False)
    adapted.set_adapter(["default"])
    if called:
        adapted.base_layer.bias.requires_grad_()
    return adapted


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def assert_compiled_is_eager(compiled, adapted, tokens):
    x = torch.randn(tokens, 16, requires_grad=True)
    expected, y = adapted(x), compiled(x)
    torch.testing.assert_close(y, expected)
    theta = adapted.bone_block["default"]
    want, got = (torch.autograd.grad(out.square().sum(), [x, theta]) for out in (expected, y))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.fixture
def compiling():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's tracer and inductor have their own
        yield
    torch._dynamo.reset()


def slow_but_for(*others):
    return [variant if variant in others else pytest.param(variant, marks=pytest.mark.slow) for variant in VARIANTS]


needs_cpp = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "clang++", "c++")), reason="inductor compiles C++, and there is no compiler"
)


@pytest.mark.usefixtures("compiling")
class TestCompiled:
    """`torch.compile(..., fullgraph=True)`: one graph, without a step back into Python."""

    @needs_cpp
    @pytest.mark.parametrize("called", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "called"])
    @pytest.mark.parametrize("variant", slow_but_for("bone", "bat"))
    def test_a_layer_by_inductor(self, variant, called):
        adapted = layer(variant, called)
        assert_compiled_is_eager(torch.compile(adapted, fullgraph=True), adapted, tokens=20)
        assert graphs() == 1

    @pytest.mark.parametrize("called", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "called"])
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_other_lengths_do_not_compile_again(self, variant, called):
        """One graph for the first length, one for all others: batches of a training run have many."""
        adapted = layer(variant, called)
        compiled = torch.compile(adapted, fullgraph=True, backend="aot_eager")
        for tokens in (30, 31, 40, 64):
            assert_compiled_is_eager(compiled, adapted, tokens)
        assert graphs() == 2

    @needs_cpp
    @pytest.mark.slow
    @pytest.mark.parametrize("variant", ["bone", "bat"])
    def test_a_model_by_inductor(self, variant):
        model = adapted(variant, llama()).train()
        compiled = torch.compile(model, fullgraph=True)
        outputs = [each(IDS, labels=IDS).loss for each in (model, compiled)]
        assert graphs() == 1
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
        parameters = list(blocks(model).values())
        want, got = (torch.autograd.grad(loss, parameters) for loss in outputs)
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


def test_tensor_parallelism_is_refused():
    """Each process would adapt a part of the weight, and no variant is defined for parts."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
        base = nn.Sequential(nn.Linear(8, 8))
        parallelize_module(base, mesh, {"0": ColwiseParallel()})
        with pytest.raises(TargetError, match="0 is split between processes by tensor parallelism"):
            get_peft_model(base, config(target_modules=["0"]))
    finally:
        torch.distributed.destroy_process_group()
