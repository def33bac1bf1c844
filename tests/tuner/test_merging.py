"""Merging and unmerging: float32 sums, every bit restored, several adapters, tied weights, the cheap arithmetic."""

import copy

import pytest
import torch
from adapted_models import adapted, assert_follows_the_equations, base_model, config, logits
from conftest import llama
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import nn

from bonetune import VARIANTS, BoneLayer, BoneLinear, InputError, ShardSpec
from bonetune.ops import Update, merge

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@st.composite
def layers(draw):
    """A Linear of any size and dtype with one to three random adapters that fit it, ragged where the variant allows."""
    out, inp, r = draw(st.integers(1, 24)), draw(st.integers(1, 24)), draw(st.integers(1, 6))
    variants = [draw(st.sampled_from(VARIANTS)) for _ in range(draw(st.integers(1, 3)))]
    if any(v not in ("bone", "mini") for v in variants):
        out, inp = out * r, inp * r
    layer = BoneLinear(nn.Linear(inp, out).to(draw(st.sampled_from(DTYPES))))
    for i, variant in enumerate(variants):
        spec = ShardSpec(variant, min(r, inp), draw(st.sampled_from([d for d in range(1, out + 1) if out % d == 0])))
        layer.update_layer(f"a{i}", spec, zeros=False)
        layer.set_scale(f"a{i}", draw(st.sampled_from([1.0, -0.7, 3.0])))
    return layer


@pytest.mark.filterwarnings("ignore:.*additionally merging.*")
@settings(deadline=None, max_examples=200)
@given(layers(), st.data())
def test_unmerge_restores_every_bit_of_any_layer(layer, data):
    weight = layer.get_base_layer().weight
    before = weight.clone()
    names = data.draw(st.permutations(sorted(layer.bone_block)))
    layer.merge(adapter_names=names[:1])
    for name in names[1:]:
        layer.merge(adapter_names=[*layer.merged_adapters, name])
    merged = layer.get_base_layer().weight
    updates = [Update(layer.bone_block[n], layer.bone_spec[n], layer.bone_scaling[n]) for n in names]
    expected = merge(before.double(), [u._replace(theta=u.theta.double()) for u in updates])
    assert merged.dtype == before.dtype
    bound = torch.finfo(before.dtype).eps * expected.abs() + 1e-5 * expected.abs().max()
    assert ((merged - expected).abs() <= bound).all()
    layer.unmerge()
    assert layer.get_base_layer().weight is weight
    assert torch.equal(weight, before)
    assert not layer.merged


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unmerge_restores_every_bit(variant, dtype):
    model = adapted(variant, llama().to(dtype))
    model.add_adapter("other", config("bone"))
    before = {n: p.clone() for n, p in model.state_dict().items()}
    expected = logits(model)
    model.merge_adapter(["default"])
    assert any(not torch.equal(p, before[n]) for n, p in model.state_dict().items())
    torch.testing.assert_close(logits(model), expected, rtol=0.1, atol={torch.float32: 1e-3}.get(dtype, 0.5))
    with pytest.warns(UserWarning, match="additionally merging other"):
        model.merge_adapter(["default", "other"])
    model.unmerge_adapter()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[n], before[n]) for n in before)


def test_unmerging_what_is_not_merged_warns():
    with pytest.warns(UserWarning, match="Already unmerged"):
        adapted().unmerge_adapter()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("safe", [True, False])
def test_merge_and_unload(variant, safe, capsys):
    model = adapted(variant)
    expected = logits(model)
    plain = model.merge_and_unload(progressbar=False, safe_merge=safe, adapter_names=["default"])
    assert type(plain) is type(llama())
    assert not any(isinstance(m, BoneLayer) for m in plain.modules())
    torch.testing.assert_close(logits(plain), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_unload_gives_the_base_model_back(variant):
    plain = adapted(variant).unload()
    base = base_model()
    assert plain.state_dict().keys() == base.state_dict().keys()
    assert torch.equal(logits(plain), logits(base))


@pytest.mark.parametrize("variant", VARIANTS)
def test_safe_merge_refuses_nan_and_leaves_the_base_alone(variant):
    model = adapted(variant, target_modules=["down_proj", "q_proj"])
    before = {n: p.clone() for n, p in model.state_dict().items() if "base_layer" in n}
    layers = [m for m in model.modules() if isinstance(m, BoneLayer)]
    layers[0].bone_block["default"].data.view(-1)[-1] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        layers[0].merge(safe_merge=True)
    assert not layers[0].merged
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items() if n in before)


def test_disabling_an_adapter_gives_the_base_model_even_when_merged():
    model = adapted("bat")
    expected = logits(base_model())
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert_follows_the_equations(model)


@pytest.mark.filterwarnings("ignore:.*tie.*")
@pytest.mark.parametrize("variant", ["bone", "bat"])
def test_merging_into_a_tied_weight_leaves_the_other_end_alone(tmp_path, variant):
    """lm_head and the embedding share a Parameter: the update belongs to lm_head."""
    base = llama(tie_word_embeddings=True)
    model = get_peft_model(base, config(variant, target_modules=["lm_head", "q_proj"])).eval()
    expected, embedding = logits(model), base.model.embed_tokens.weight
    before = embedding.clone()
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(embedding, before)
    model.unmerge_adapter()
    assert base.lm_head.base_layer.weight is embedding
    plain = model.merge_and_unload()
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-4)
    assert not plain.config.tie_word_embeddings
    plain.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(type(plain).from_pretrained(tmp_path)), expected, rtol=1e-4, atol=1e-4)


def test_a_merged_model_may_change_its_dtype():
    model = adapted("bat", llama())
    model.add_adapter("other", config("bone"))
    model.merge_adapter(["default"])
    model.to(torch.bfloat16)
    with pytest.warns(UserWarning, match="additionally merging"):
        model.merge_adapter(["other"])
    assert logits(model).dtype == torch.bfloat16
    model.unmerge_adapter()
    for name, tensor in llama().bfloat16().state_dict().items():
        mine = model.base_model.model.state_dict()
        assert torch.equal(mine.get(name, mine.get(name.replace("weight", "base_layer.weight"))), tensor), name


@pytest.mark.filterwarnings("ignore:.*additionally merging.*")
@pytest.mark.parametrize("order", [["default", "other"], ["other", "default"]])
def test_merging_one_after_the_other_is_merging_both(order):
    """Each update comes from the frozen weight, not from what an earlier merge made of it."""
    model = adapted("bat")
    model.add_adapter("other", config("bat-row"))
    model.base_model.set_adapter(["default", "other"])
    expected = logits(model)
    for name in order:
        model.merge_adapter([name])
    torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_safe_merge_refuses_before_the_first_layer_is_touched(variant):
    """The broken tensor is the last layer's."""
    model = adapted(variant)
    [m for m in model.modules() if isinstance(m, BoneLayer)][-1].bone_block["default"].data.view(-1)[0] = torch.inf
    before = copy.deepcopy(model.state_dict())
    for merging in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
            merging(safe_merge=True)
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(t, before[n]) for n, t in after.items())
        assert not any(m.merged for m in model.modules() if isinstance(m, BoneLayer))


def test_safe_merge_looks_at_the_adapters_layers_alone():
    model = adapted("bone", target_modules=["q_proj"])
    model.add_adapter("other", config("bone", target_modules=["up_proj"]))
    up = model.base_model.model.model.layers[0].mlp.up_proj
    up.base_layer.weight.data[0, 0] = torch.inf
    model.merge_adapter(["default"], safe_merge=True)
    assert not up.merged
    with pytest.raises(ValueError, match=r"adapter other seems to be broken: .*0\.mlp\.up_proj"):
        model.merge_adapter(["other", "default"], safe_merge=True)


def test_a_merge_that_fails_midway_is_undone_on_all_layers():
    model = adapted("bat", llama())
    model.add_adapter("other", config("bone"))
    model.merge_adapter(["other"])
    before = copy.deepcopy(model.state_dict())
    last = [m for m in model.modules() if isinstance(m, BoneLayer)][-1]
    last.bone_block["default"].data = last.bone_block["default"].data[:-1]
    with pytest.warns(UserWarning, match="additionally merging"), pytest.raises(ValueError, match="has shape"):
        model.merge_adapter(["default"])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) or "bone_block.default" in name, name
    assert {tuple(m.merged_adapters) for m in model.modules() if isinstance(m, BoneLayer)} == {("other",)}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_an_adapter_file_never_holds_a_merged_embedding(tmp_path):
    """PEFT writes embeddings that are targeted into the file."""
    model = adapted("bone", llama(), target_modules=["embed_tokens"])
    model.merge_adapter()
    with pytest.raises(InputError, match=r"embed_tokens has adapters merged.*call `unmerge_adapter` before saving"):
        model.save_pretrained(tmp_path)
    model.unmerge_adapter()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model))


class TestCheapArithmetic:
    """`merge_adapter(exact_unmerge=False)` keeps nothing and computes the weights back."""

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_it_keeps_nothing_and_comes_back_up_to_rounding(self, variant):
        model = adapted(variant, llama())
        model.add_adapter("other", config("bone"))
        model.base_model.set_adapter(["default", "other"])
        expected, before = logits(model), copy.deepcopy(model.state_dict())
        model.merge_adapter(exact_unmerge=False)
        assert not any(m._original for m in model.modules() if isinstance(m, BoneLayer))
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, before[name], rtol=1e-4, atol=1e-5, msg=name)

    def test_a_scale_changed_meanwhile_is_of_no_account(self):
        model = adapted("bat", llama(), target_modules=["q_proj"])
        before = copy.deepcopy(model.state_dict())
        model.merge_adapter(exact_unmerge=False)
        for layer in (m for m in model.modules() if isinstance(m, BoneLayer)):
            with pytest.warns(UserWarning, match="merged at its old scale"):
                layer.set_scale("default", 0.1)
        model.unmerge_adapter()
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, before[name], rtol=1e-4, atol=1e-5, msg=name)

    def test_what_cannot_be_undone_is_refused_first(self):
        model = adapted("bat")
        model.add_adapter("other", config("bat-row"))
        model.base_model.set_adapter(["default", "other"])
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=r"different kinds \(default, other, into model\.layers\.0"):
            model.merge_adapter(exact_unmerge=False)
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
        expected = logits(model)
        torch.testing.assert_close(logits(model.merge_and_unload()), expected)

    def test_on_top_of_it_nothing_is_promised_that_cannot_be_kept(self):
        model = adapted("bat")
        model.add_adapter("other", config("bat-row"))
        model.add_adapter("third", config("bone"))
        model.merge_adapter(["default"], exact_unmerge=False)
        with pytest.raises(ValueError, match=r"default was merged into .*q_proj without keeping its weight"):
            model.merge_adapter(["other"])
        with pytest.raises(ValueError, match="different kinds"):
            model.merge_adapter(["other"], exact_unmerge=False)
        with pytest.warns(UserWarning, match="additionally merging third"):
            model.merge_adapter(["default", "third"], exact_unmerge=False)
        before = base_model().state_dict()
        model.unmerge_adapter()
        for name, tensor in model.base_model.model.state_dict().items():
            if "base_layer" in name:
                torch.testing.assert_close(tensor, before[name.replace("base_layer.", "")], rtol=1e-8, atol=1e-8)

    @pytest.mark.parametrize("variant", ["bone", "bat"])
    def test_an_adapter_that_is_trained_on_while_merged(self, variant):
        model = adapted(variant, llama())
        before = copy.deepcopy(model.state_dict())
        model.merge_adapter(exact_unmerge=False)
        for layer in (m for m in model.modules() if isinstance(m, BoneLayer)):
            layer.bone_block["default"].data.mul_(-3)
        model.unmerge_adapter()
        for name, tensor in model.state_dict().items():
            if "base_layer" in name:
                torch.testing.assert_close(tensor, before[name], rtol=1e-4, atol=1e-5, msg=name)

    def test_a_merge_that_lost_information_stays_merged(self):
        """With B = -I the merged weight is -I whatever W was."""
        layer = BoneLinear(nn.Linear(8, 8))
        layer.update_layer("default", ShardSpec("bat", 4))
        layer.set_adapter(["default"])
        layer.bone_block["default"].data.copy_(-torch.eye(4))
        layer.exact_unmerge = False
        layer.merge()
        merged = layer.base_layer.weight.clone()
        with pytest.raises(torch.linalg.LinAlgError):
            layer.unmerge()
        assert layer.merged_adapters == ["default"]
        assert torch.equal(layer.base_layer.weight, merged)
        layer.exact_unmerge = True


def test_nothing_is_kept_after_merge_and_unload():
    """And what a merge keeps is in no state dict."""
    model = adapted("bat", llama())
    size = len(model.state_dict())
    model.merge_adapter()
    assert len(model.state_dict()) == size
    layers = [m for m in model.modules() if isinstance(m, BoneLayer)]
    assert all(layer._original for layer in layers)
    model.unmerge_adapter()
    model.merge_and_unload()
    assert not any(layer._original for layer in layers)


@pytest.mark.filterwarnings("ignore:.*tie.*")
def test_what_is_kept_goes_to_host_memory_unless_it_is_tied():
    model = get_peft_model(llama(tie_word_embeddings=True), config(target_modules=["lm_head", "q_proj"]))
    model.merge_adapter()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, BoneLayer)}
    kept = {n: layer._original[0].parameter for n, layer in layers.items()}
    in_the_model = {id(p) for p in model.parameters()}
    assert {n for n, p in kept.items() if id(p) in in_the_model} == {"base_model.model.lm_head"}
    moved = []
    for layer in layers.values():
        layer._original[0].move_to_host = lambda layer=layer: moved.append(layer)
        layer.keep_original_on_host(in_the_model)
    assert moved == [layer for n, layer in layers.items() if "lm_head" not in n]
