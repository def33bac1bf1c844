"""Layers other than Linear: Conv1D of transformers, convolutions, embeddings, parameters; shared and unusual modules."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from adapted_models import config
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from bonetune import VARIANTS, BoneConv, BoneEmbedding, BoneLayer, BoneLinear, TargetError, hotswap_adapter
from bonetune.ops import Update, merge
from bonetune.tuner.parameter import ParamWrapper


class Experts(nn.Module):
    """Three experts (3, out, in) and a mixing matrix, as a mixture's block holds them; `transposed` stores (3, in, out)."""

    def __init__(self, transposed=False):
        super().__init__()
        self.is_transposed = transposed
        self.up = nn.Parameter(torch.randn(3, 8, 12) if transposed else torch.randn(3, 12, 8))
        self.mix = nn.Parameter(torch.randn(12, 12))

    def forward(self, x, *, weights):
        each = torch.einsum("...i,eio->...eo" if self.is_transposed else "...i,eoi->...eo", x, self.up)
        return torch.einsum("...eo,e->...o", each, weights) @ self.mix.T


class Mixture(nn.Module):
    def __init__(self, transposed=False):
        super().__init__()
        self.experts = Experts(transposed)

    def forward(self, x):
        return self.experts(x, weights=torch.tensor([0.5, 0.3, 0.2], dtype=x.dtype))


IDS = torch.arange(12).reshape(3, 4) * 2 % 24
# a model, what to target in it, what it is called with
MODELS = {
    "Conv1D": (lambda: nn.Sequential(Conv1D(12, 8)), {"target_modules": ["0"]}, torch.randn(3, 5, 8)),
    "Conv2d 1x1": (lambda: nn.Sequential(nn.Conv2d(8, 12, 1)), {"target_modules": ["0"]}, torch.randn(3, 8, 5, 5)),
    "Conv2d 3x3": (lambda: nn.Sequential(nn.Conv2d(8, 12, 3)), {"target_modules": ["0"]}, torch.randn(3, 8, 5, 5)),
    "Conv1d": (lambda: nn.Sequential(nn.Conv1d(8, 12, 2)), {"target_modules": ["0"]}, torch.randn(3, 8, 5)),
    "Conv3d": (lambda: nn.Sequential(nn.Conv3d(8, 12, 2)), {"target_modules": ["0"]}, torch.randn(3, 8, 3, 3, 3)),
    "Embedding": (lambda: nn.Sequential(nn.Embedding(24, 12)), {"target_modules": ["0"]}, IDS),
    "experts": (Mixture, {"target_parameters": ["experts.up", "experts.mix"]}, torch.randn(3, 5, 8)),
    "experts, transposed": (lambda: Mixture(True), {"target_parameters": ["experts.up"]}, torch.randn(3, 5, 8)),
}


def made(kind, variant, **changes):
    torch.manual_seed(0)
    base, targets, x = MODELS[kind]
    settings = {"target_modules": [], "mini_r": 3} | targets | changes
    model = get_peft_model(base().double(), config(variant, **settings)).double().eval()
    return model, x.double() if x.is_floating_point() else x


@torch.no_grad()
def by_the_equations(model):
    """The base model with weights merged by `ops.merge`."""
    plain = copy.deepcopy(model).unload()
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, BoneLayer):
            weight = getattr(plain.get_submodule(name.replace(".base_layer", "")), layer.weight_name)
            stored = layer.matrices(weight)
            weight.copy_(layer.as_stored(merge(stored, [Update(layer.bone_block["default"], layer.bone_spec["default"])])))
    return plain


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("variant", VARIANTS)
class TestEachLayer:
    def test_it_starts_at_the_base_layer(self, kind, variant):
        model, x = made(kind, variant, init_weights=True)
        with model.disable_adapter():
            expected = model(x)
        torch.testing.assert_close(model(x), expected, rtol=1e-14, atol=1e-15)

    def test_forward_is_that_of_the_merged_weight(self, kind, variant):
        model, x = made(kind, variant)
        expected = by_the_equations(model)(x)
        with model.disable_adapter():
            assert (model(x) - expected).abs().max() > 0.1
        torch.testing.assert_close(model(x), expected)

    def test_merge_and_unmerge(self, kind, variant):
        model, x = made(kind, variant)
        expected, before = model(x), copy.deepcopy(model.state_dict())
        model.merge_adapter(safe_merge=True)
        torch.testing.assert_close(model(x), expected)
        assert any(not torch.equal(t, before[n]) for n, t in model.state_dict().items())
        model.unmerge_adapter()
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
        plain = model.merge_and_unload()
        assert not any(isinstance(m, BoneLayer) for m in plain.modules())
        torch.testing.assert_close(plain(x), expected)

    def test_gradients_are_those_of_the_merged_weight(self, kind, variant):
        model, x = made(kind, variant)
        thetas = {n: p for n, p in model.named_parameters() if p.requires_grad}
        y = model(x)
        gradients = torch.autograd.grad(y.square().sum(), list(thetas.values()))
        for (name, theta), gradient in zip(thetas.items(), gradients, strict=True):
            direction = torch.randn_like(theta)
            with torch.no_grad():
                theta.add_(1e-6 * direction)
                up = by_the_equations(model)(x).square().sum()
                theta.sub_(2e-6 * direction)
                down = by_the_equations(model)(x).square().sum()
                theta.add_(1e-6 * direction)
            torch.testing.assert_close((gradient * direction).sum(), (up - down) / 2e-6, rtol=1e-5, atol=1e-6, msg=name)

    def test_files(self, kind, variant, tmp_path):
        model, x = made(kind, variant)
        model.save_pretrained(tmp_path)
        torch.manual_seed(0)
        again = PeftModel.from_pretrained(MODELS[kind][0]().double(), tmp_path).eval()
        assert torch.equal(again.double()(x), model(x))

    def test_a_second_adapter_and_scale(self, kind, variant):
        model, x = made(kind, variant)
        first = model(x)
        settings = {"target_modules": []} | MODELS[kind][1]
        model.add_adapter("other", config("bone", r=2, **settings))
        model.double().set_adapter("other")
        assert not torch.allclose(model(x), first)
        model.set_adapter("default")
        torch.testing.assert_close(model(x), first)
        for layer in (m for m in model.modules() if isinstance(m, BoneLayer)):
            layer.set_scale("default", 0)
        with model.disable_adapter():
            expected = model(x)
        torch.testing.assert_close(model(x), expected)


def test_each_kind_has_its_layer():
    kinds = {"Conv1D": BoneLinear, "Conv2d 3x3": BoneConv, "Embedding": BoneEmbedding, "experts": ParamWrapper}
    for kind, cls in kinds.items():
        model, _ = made(kind, "bone")
        assert {type(m) for m in model.modules() if isinstance(m, BoneLayer)} == {cls}


@pytest.mark.parametrize(("shape", "expected"), [((12, 8, 1, 1), (4, 12)), ((12, 8, 3, 3), (9, 4, 12))])
def test_shapes_of_a_convolutions_tensors(shape, expected):
    model = get_peft_model(nn.Sequential(nn.Conv2d(8, 12, shape[-1])), config(target_modules=["0"]))
    assert model.base_model.model[0].bone_block["default"].shape == expected


def test_a_float32_adapter_on_bfloat16_layers():
    for kind in MODELS:
        for variant in VARIANTS:
            model, x = made(kind, variant)
            exact = model(x)
            base, targets, _ = MODELS[kind]
            narrow = get_peft_model(base().bfloat16(), config(variant, **({"target_modules": [], "mini_r": 3} | targets)))
            narrow.load_state_dict(model.state_dict())
            y = narrow(x.bfloat16() if x.is_floating_point() else x)
            assert y.dtype == torch.bfloat16
            assert {p.dtype for p in narrow.parameters() if p.requires_grad} == {torch.float32}
            assert (y - exact).norm() < 0.02 * exact.norm(), (kind, variant)
            y.sum().backward()


@pytest.mark.parametrize("kind", ["Conv1D", "Conv2d 3x3"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast(kind, variant):
    model, x = made(kind, variant)
    model, x = model.float().train(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), model(x), rtol=0.05, atol=0.1)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's tracer does it itself
@pytest.mark.parametrize("kind", ["Conv1D", "Conv2d 3x3", "Embedding", "experts"])
@pytest.mark.parametrize("variant", ["bone", "bat", "bat-left"])
def test_compiled_whole(kind, variant):
    model, x = made(kind, variant)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


class TestEmbedding:
    def test_its_scale_is_the_updates_too(self):
        """Gemma multiplies what it looks up."""

        class Scaled(nn.Embedding):
            embed_scale = 3.0

            def forward(self, ids):
                return super().forward(ids) * self.embed_scale

        model = get_peft_model(nn.Sequential(Scaled(24, 12)), config("bat", target_modules=["0"])).eval()
        y = model(IDS)
        torch.testing.assert_close(model.merge_and_unload()(IDS), y)

    def test_the_padding_row_gets_no_gradient(self):
        model = get_peft_model(nn.Sequential(nn.Embedding(24, 12, padding_idx=2)), config("bone", target_modules=["0"]))
        model(IDS).sum().backward()
        gradient = model.base_model.model[0].bone_block["default"].grad
        assert gradient[:, 2].eq(0).all()
        assert gradient[:, 4].ne(0).all()

    def test_one_that_renormalizes_its_weight_is_refused(self):
        with pytest.raises(TargetError, match=r"max_norm=1.*modules_to_save"):
            get_peft_model(nn.Sequential(nn.Embedding(24, 12, max_norm=1.0)), config(target_modules=["0"]))


class TestSharedModules:
    def pair(self):
        torch.manual_seed(0)
        one = nn.Linear(8, 8)
        return nn.ModuleDict({"a": one, "b": one, "c": nn.Linear(8, 8)})

    def test_a_module_with_two_names_is_adapted_under_both(self):
        base = self.pair()
        model = get_peft_model(base, config(target_modules=["a", "c"]))
        assert isinstance(base["b"], BoneLinear)
        assert base["a"] is base["b"]
        x = torch.randn(3, 8)
        expected = base["b"](x)
        plain = model.merge_and_unload()
        assert plain["a"] is plain["b"]
        assert type(plain["b"]) is nn.Linear
        torch.testing.assert_close(plain["b"](x), expected)

    def test_unloaded_under_both_names(self):
        base = self.pair()
        get_peft_model(base, config(target_modules=["a"])).unload()
        assert type(base["a"]) is type(base["b"]) is nn.Linear

    def test_the_second_name_alone_is_refused(self):
        with pytest.raises(TargetError, match="b is the same module as a"):
            get_peft_model(self.pair(), config(target_modules=["b"]))


class TestLayersThatAreReadInsteadOfCalled:
    """torch's own Transformer reads weights in evaluation and in attention: an adapter there would change nothing."""

    def encoder(self):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        return nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 2)}).eval()

    def test_a_transformer_encoder_in_evaluation(self):
        base, x = self.encoder(), torch.randn(3, 5, 16)
        padding = torch.zeros(3, 5, dtype=torch.bool)
        padding[1:, 3:] = True
        get_peft_model(base, config(target_modules=["linear1", "linear2"]))
        with torch.no_grad():
            for mask in (None, padding):
                in_evaluation = base["encoder"].eval()(x, src_key_padding_mask=mask)
                in_training = base["encoder"].train()(x, src_key_padding_mask=mask)
                kept = slice(None) if mask is None else ~mask
                torch.testing.assert_close(in_evaluation[kept], in_training[kept])

    def test_all_linear_is_all_that_is_called(self):
        model = get_peft_model(self.encoder(), config(target_modules="all-linear"))
        adapted = {name.rsplit(".", 1)[1] for name, m in model.named_modules() if isinstance(m, BoneLayer)}
        assert adapted == {"linear1", "linear2"}

    def test_unloading_gives_the_fast_path_back(self):
        base = self.encoder()
        before = base["encoder"].use_nested_tensor, base["encoder"].layers[1].activation_relu_or_gelu
        model = get_peft_model(base, config(target_modules=["linear1"]))
        assert not base["encoder"].layers[1].activation_relu_or_gelu
        plain = model.merge_and_unload()["encoder"]
        assert (plain.use_nested_tensor, plain.layers[1].activation_relu_or_gelu) == before

    def test_attentions_output_layer_is_refused(self):
        with pytest.raises(TargetError, match=r"self_attn\.out_proj is never called.*modules_to_save"):
            get_peft_model(self.encoder(), config(target_modules=["out_proj", "linear1"]))

    def test_attentions_input_weight_is_a_parameter_to_target(self):
        base, x = self.encoder(), torch.randn(3, 5, 16)
        model = get_peft_model(base, config(target_modules=[], target_parameters=["self_attn.in_proj_weight"]))
        with torch.no_grad():
            expected = base["encoder"](x)
            with model.disable_adapter():
                assert (base["encoder"](x) - expected).abs().max() > 1e-3
            torch.testing.assert_close(model.merge_and_unload()["encoder"](x), expected)


class TestParameters:
    def test_dropout_and_rows_of_their_own_are_refused(self):
        with pytest.raises(ValueError, match=r"bone_dropout.*experts\.up"):
            made("experts", "bone", bone_dropout=0.1)
        model, x = made("experts", "bone")
        with pytest.raises(ValueError, match="Rows of one batch cannot have different adapters"):
            model(x, adapter_names=["default", "__base__", "default"])

    def test_an_r_that_cannot_be_changes_nothing(self):
        base = Mixture()
        with pytest.raises(ValueError, match=r"experts\.up, shape \(12, 8\)"):
            get_peft_model(base, config("bat", r=5, target_modules=[], target_parameters=["experts.up"]))
        assert type(base.experts) is Experts

    def test_a_bias_is_no_matrix(self):
        with pytest.raises(TargetError, match=r"bias of Linear has shape \(8,\)"):
            get_peft_model(nn.ModuleDict({"a": nn.Linear(8, 8)}), config(target_modules=[], target_parameters=["a.bias"]))

    def test_an_adapted_layers_parameter(self):
        base = nn.ModuleDict({"a": nn.Linear(8, 8)})
        with pytest.raises(ValueError, match="not a valid target"):
            get_peft_model(base, config(target_modules=["a"], target_parameters=["a.weight"]))

    def test_a_merged_parameter_has_no_base_rows(self):
        model, x = made("experts", "bone")
        model.merge_adapter()
        with pytest.raises(ValueError, match="call `unmerge_adapter` first"):
            model(x, adapter_names=["__base__"] * 3)

    def test_all_adapters_target_the_same_parameters(self):
        model, x = made("experts, transposed", "bone")
        expected = model(x)
        with pytest.raises(ValueError, match=r"default has \['experts\.up'\], the new one \['experts\.mix'\]"):
            model.add_adapter("other", config(target_modules=[], target_parameters=["experts.mix"]))
        torch.testing.assert_close(model(x), expected)

    def test_an_offloaded_parameter_is_refused(self):
        model, x = made("experts", "bone")
        cpu_offload(model)
        with pytest.raises(ValueError, match="is offloaded"):
            model(x)

    @pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")  # PEFT looks at modules alone
    def test_a_rank_of_its_own_and_a_swap(self, tmp_path):
        model, x = made("experts", "bone", rank_pattern={"experts.up": 2})
        assert {m.parameter_name: m.bone_spec["default"].r for m in model.modules() if isinstance(m, ParamWrapper)} == {
            "up": 2,
            "mix": 4,
        }
        expected = model(x)
        model.save_pretrained(tmp_path)
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.data.zero_()
        hotswap_adapter(model, tmp_path)
        torch.testing.assert_close(model(x), expected)
