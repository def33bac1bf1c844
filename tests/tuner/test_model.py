"""Adapted models: each against one whose weights were changed by the equations, with no adapter in it."""

import itertools
import warnings

import pytest
import torch
from adapted_models import IDS, adapted, assert_follows_the_equations, base_model, config, logits
from conftest import llama
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, inject_adapter_in_model
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from bonetune import VARIANTS, BoneLayer, BoneModel, SpecError, TargetError
from bonetune.ops import delta
from bonetune.tuner import BoneLinear


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_is_that_of_the_updated_weights(variant):
    model = adapted(variant)
    assert (logits(model) - logits(base_model())).abs().max() > 0.1
    assert_follows_the_equations(model)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapter_starts_at_the_base_model(variant):
    model = adapted(variant, init_weights=True)
    assert torch.equal(logits(model), logits(base_model()))
    assert all(p.eq(0).all() for n, p in model.named_parameters() if "bone_block" in n)


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_the_adapter_trains_and_learns(variant):
    model = adapted(variant, init_weights=True).train()
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all("bone_block" in name for name in trainable)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(IDS, labels=IDS).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.95 * losses[0]
    base = base_model().state_dict()
    for name, tensor in model.base_model.model.state_dict().items():
        if "bone" not in name:
            assert torch.equal(tensor, base[name.replace("base_layer.", "")])


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_the_equations(variant):
    model = adapted(variant)
    model(IDS).logits.square().mean().backward()
    plain, weights, thetas = base_model(), {}, {}
    for name, layer in model.named_modules():
        if isinstance(layer, BoneLayer):
            key = name.removeprefix("base_model.model.") + ".weight"
            thetas[key] = layer.bone_block["default"].detach().clone().requires_grad_()
            W = plain.get_parameter(key).detach()
            weights[key] = W + delta(W, thetas[key], layer.bone_spec["default"])
    torch.func.functional_call(plain, weights, (IDS,)).logits.square().mean().backward()
    for key, theta in thetas.items():
        layer = model.base_model.model.get_submodule(key.removesuffix(".weight"))
        # float32 inside transformers' norms and rotary embeddings bounds the agreement
        torch.testing.assert_close(layer.bone_block["default"].grad, theta.grad, rtol=1e-4, atol=1e-7, msg=key)


@pytest.mark.parametrize(("first", "second"), list(itertools.product(VARIANTS, VARIANTS)))
def test_two_adapters_on_a_layer_add_in_any_order(first, second):
    model = adapted(first)
    model.add_adapter("other", config(second, r=2))
    for active in (["default", "other"], ["other", "default"], ["other"], ["default"]):
        model.base_model.set_adapter(active)
        assert_follows_the_equations(model, active)
    model.base_model.set_adapter(["default", "other"])
    expected = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected)


def test_deleting_an_adapter():
    model = adapted("bat")
    model.add_adapter("other", config("bone"))
    model.set_adapter("other")
    model.delete_adapter("default")
    assert_follows_the_equations(model, ["other"])
    assert not any("default" in name for name in model.state_dict())
    for layer in (m for m in model.modules() if isinstance(m, BoneLayer)):
        assert set(layer.bone_spec) == set(layer.bone_scaling) == set(layer.bone_dropout) == {"other"}


def test_injection_without_a_peft_model():
    model = inject_adapter_in_model(config("bat-row"), base_model()).double()
    assert isinstance(model.model.layers[0].self_attn.q_proj, BoneLinear)
    assert_follows_the_equations(model)


def test_bone_model_by_itself():
    model = BoneModel(base_model(), config("bat-left"), "default").double()
    assert_follows_the_equations(model.model)


def test_layers_modules_and_biases_are_chosen():
    chosen = adapted(target_modules=["q_proj", "up_proj"], layers_to_transform=[1], exclude_modules=["up_proj"])
    names = [n for n, m in chosen.named_modules() if isinstance(m, BoneLayer)]
    assert names == ["base_model.model.model.layers.1.self_attn.q_proj"]

    with_bias = llama(attention_bias=True)
    trains = {
        n for n, p in adapted(base=with_bias, bias="bone_only", target_modules=["q_proj"]).named_parameters() if p.requires_grad
    }
    assert {n for n in trains if "bias" in n} == {
        f"base_model.model.model.layers.{i}.self_attn.q_proj.base_layer.bias" for i in (0, 1)
    }
    model = adapted(base=llama(attention_bias=True), bias="all", target_modules=["q_proj"])
    assert sum(p.requires_grad for n, p in model.named_parameters() if n.endswith("bias")) == 8


def test_a_trained_bias_and_a_saved_module_travel(tmp_path):
    model = adapted("bat", llama(attention_bias=True), bias="bone_only", target_modules=["q_proj"], modules_to_save=["lm_head"])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(llama(attention_bias=True), tmp_path)
    assert torch.equal(logits(reloaded), expected)


def test_rank_pattern_and_trainable_count(capsys):
    model = adapted("bone", r=8, rank_pattern={"q_proj": 2}, target_modules=["q_proj", "k_proj"])
    model.print_trainable_parameters()
    assert f"trainable params: {2 * (2 * 32 + 8 * 16):,} ||" in capsys.readouterr().out


@pytest.mark.parametrize("variant", VARIANTS)
def test_dropout_acts_in_training_alone(variant):
    model = adapted(variant, bone_dropout=0.5)
    assert_follows_the_equations(model)
    model.train()
    torch.manual_seed(0)
    first, second = logits(model), logits(model)
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(logits(model), logits(model))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(variant, reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = adapted(variant).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(IDS, labels=IDS).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast(variant):
    model = adapted(variant, llama()).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(IDS, labels=IDS).loss
    loss.backward()
    torch.testing.assert_close(loss, model(IDS, labels=IDS).loss, rtol=0.05, atol=0.05)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_bfloat16_base_keeps_float32_adapters(variant):
    model = adapted(variant, llama().bfloat16())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16
    model(IDS, labels=IDS).loss.backward()
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


class TestErrors:
    def test_no_matching_module_lists_what_exists(self):
        with pytest.raises(NoMatchingPeftModuleError, match=r"Linear layers named down_proj, gate_proj, k_proj, lm_head"):
            get_peft_model(llama(), config(target_modules=["query"]))

    @pytest.mark.parametrize("variant", ["bat", "bat-row", "bat-free", "bat-left"])
    def test_an_r_that_cannot_be_names_the_layer_and_the_remedy_and_changes_nothing(self, variant):
        model = llama()
        with pytest.raises(SpecError, match=r"layers\.0\.self_attn\.q_proj.*14 layers do not fit; r=4 would fit them all"):
            get_peft_model(model, config(variant, r=5))
        assert not any(isinstance(m, BoneLayer) for m in model.modules())
        assert torch.equal(logits(get_peft_model(model, config(variant, r=4, init_weights=True))), logits(llama()))

    def test_r_larger_than_the_input(self):
        with pytest.raises(SpecError, match=r"must be less than or equal to in_features \(48\).*down_proj"):
            get_peft_model(llama(), config(r=49, target_modules=["down_proj"], layers_to_transform=[0]))

    def test_a_layer_of_another_kind(self):
        """Found before the first layer is replaced."""
        model = llama()
        with pytest.raises(TypeError, match=r"layers\.0\.mlp \(LlamaMLP\) is not supported.*modules_to_save"):
            get_peft_model(model, config(target_modules=["q_proj", "mlp"]))
        assert not any(isinstance(m, BoneLayer) for m in model.modules())

    def test_modules_that_a_file_names_are_checked_first_too(self):
        model = llama()
        keys = ["model.layers.0.self_attn.q_proj", "model.layers.0.input_layernorm"]
        with pytest.raises(TargetError, match=r"input_layernorm \(LlamaRMSNorm\) is not supported"):
            inject_adapter_in_model(config(), model, state_dict={f"{key}.bone_block": torch.zeros(4, 32) for key in keys})
        assert not any(isinstance(m, BoneLayer) for m in model.modules())

    def test_a_second_adapter_that_fails_leaves_the_first(self):
        model = adapted("bone")
        expected = logits(model)
        with pytest.raises(SpecError):
            model.add_adapter("other", config("bat", r=5))
        assert list(model.peft_config) == ["default"]
        assert torch.equal(logits(model), expected)


def test_task_type_gives_peft_models_class():
    model = get_peft_model(llama(), config(task_type=TaskType.CAUSAL_LM))
    assert type(model).__name__ == "PeftModelForCausalLM"
    assert model.generate(input_ids=IDS, max_new_tokens=2, do_sample=False).shape == (2, 14)


def test_a_base_layer_with_hooks_is_called():
    """What other libraries hang on the base layer must run, also where a variant needs the product without the bias."""
    for variant in ("bone", "bat-row", "bat-left"):
        model = adapted(variant, llama(attention_bias=True), target_modules=["q_proj"])
        expected = logits(model)
        calls = []
        for layer in (m for m in model.modules() if isinstance(m, BoneLayer)):
            layer.base_layer.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
        assert len(calls) == 2, variant


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_wrapped_linear_subclass_is_called_not_bypassed(variant):
    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Doubling(8, 12))
    x = torch.randn(3, 8)
    base = model(x)
    wrapped = get_peft_model(model, config(variant, target_modules=["0"], init_weights=True))
    if variant != "bat":  # bat replaces the weight, which a layer that is more than its weight does not survive
        torch.testing.assert_close(wrapped(x), base)


def test_lora_beside_bone_is_still_lora():
    """Registration leaves PEFT's own methods alone."""
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    assert torch.equal(logits(model), logits(llama()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.merge_and_unload()


def test_peft_s_status_names_the_method():
    assert adapted().get_model_status().peft_types == {"default": "BONE"}


@pytest.mark.parametrize("pattern", ["layers", ["layers", "blocks"]])
def test_layers_are_found_by_the_name_of_their_list(pattern):
    model = adapted(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern=pattern)
    assert [n for n, m in model.named_modules() if isinstance(m, BoneLayer)] == [
        "base_model.model.model.layers.1.self_attn.q_proj"
    ]
