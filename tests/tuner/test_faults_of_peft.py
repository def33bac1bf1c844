"""Faults of PEFT's own MiSS and LoRA (0.21), each by one check that their layers fail and ours pass.

Where a check needs what PEFT's last Bone (0.18.1) does wrong, `test_peft_018.py` has it, in an environment of its own.
"""

import warnings

import pytest
import torch
from adapted_models import IDS, config, logits
from conftest import llama
from peft import LoraConfig, MissConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D


class Ours:
    """bone or bat by this package."""

    @staticmethod
    def config(kind, **changes):
        return config(kind, **({"r": 4} | changes))


class Miss:
    """The same function by PEFT."""

    @staticmethod
    def config(kind, **changes):
        dropout = {"miss_dropout": changes.pop("bone_dropout")} if "bone_dropout" in changes else {}
        start = {"bone": changes.pop("init_weights", False), "bat": "bat"}.get(kind, kind)
        return MissConfig(**({"r": 4, "target_modules": "all-linear", "init_weights": start} | changes | dropout))


class Lora:
    """PEFT's LoRA in the place of bone."""

    @staticmethod
    def config(kind, **changes):
        return LoraConfig(**({"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | changes))


def block(model, adapter="default"):
    """The adapter's tensors."""
    return [p for n, p in model.named_parameters() if f"_block.{adapter}" in n or f"lora_B.{adapter}" in n]


def adapted(method, kind, base=None, **changes):
    torch.manual_seed(0)
    model = get_peft_model(base or llama(), method.config(kind, **changes))
    for theta in block(model):
        nn.init.normal_(theta, std=0.05)
    return model.eval()


def base_weights(model):
    return {n: t.clone() for n, t in model.state_dict().items() if "_block" not in n and "lora_" not in n}


def assert_equal(before, after):
    assert all(torch.equal(before[name], after[name]) for name in before)


def two_variants_on_one_layer(method):
    model = adapted(method, "bone")
    model.add_adapter("other", method.config("bat"))
    for theta in block(model, "other"):
        nn.init.normal_(theta, std=0.05)
    first = logits(model)
    model.set_adapter("other")
    assert (logits(model) - first).abs().max() > 1e-3


def unmerging_bat_over_bfloat16(method):
    model = adapted(method, "bat", llama().bfloat16())
    before = base_weights(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert_equal(before, base_weights(model))


def unmerging_a_block_at_minus_one(method):
    """There the merged weight has forgotten W."""
    model = adapted(method, "bat", target_modules=["q_proj"])
    for theta in block(model):
        theta.data.copy_(-torch.eye(4).expand_as(theta))
    before = base_weights(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert_equal(before, base_weights(model))


def unmerging_bone(method):
    model = adapted(method, "bone")
    before = base_weights(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert_equal(before, base_weights(model))


def refusing_a_broken_adapter_of_ragged_shards(method):
    model = adapted(method, "bone", r=5, target_modules=["q_proj"])
    block(model)[0].data[0, 0] = torch.nan
    before = base_weights(model)
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert_equal(before, base_weights(model))


def merging_ragged_shards_leaves_a_tied_weight_alone(method):
    base = llama(tie_word_embeddings=True)
    model = adapted(method, "bone", base, r=5, target_modules=["lm_head"])
    embedding = base.model.embed_tokens.weight.clone()
    model.merge_adapter()
    assert torch.equal(base.model.embed_tokens.weight, embedding)


def a_refused_merge_touches_no_layer(method):
    """The last layer's adapter is broken."""
    model = adapted(method, "bone")
    block(model)[-1].data.view(-1)[0] = torch.nan
    before = base_weights(model)
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert_equal(before, base_weights(model))


def a_module_with_two_names(method):
    one = nn.Linear(8, 8)
    base = nn.ModuleDict({"a": one, "b": one})
    adapted(method, "bone", base, target_modules=["a"])
    assert base["a"] is base["b"]


def torchs_encoder_in_evaluation(method):
    """Its fast path reads the weights of layers instead of calling them."""
    torch.manual_seed(0)
    layer, x = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).eval(), torch.randn(2, 3, 16)
    base = nn.ModuleDict({"encoder": layer})
    adapted(method, "bone", base, target_modules=["linear1"])
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), layer.train()(x))


def attentions_output_layer(method):
    """torch's attention reads its weight: an adapter on it is refused, or it counts."""
    torch.manual_seed(0)
    layer, x = nn.MultiheadAttention(16, 2), torch.randn(2, 3, 16)
    expected = layer(x, x, x)[0]
    try:
        adapted(method, "bone", nn.ModuleDict({"attention": layer}), target_modules=["out_proj"])
    except TypeError:
        return
    assert not torch.allclose(layer(x, x, x)[0], expected)


def a_weighted_sum(method):
    model = adapted(method, "bone")
    model.add_adapter("other", method.config("bone"))
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum", combination_type="linear")
    model.set_adapter("sum")
    said = logits(model)
    for layer in (m for m in model.modules() if hasattr(m, "set_scale")):
        layer.set_scale("default", 0.5)
        layer.set_scale("other", 0.5)
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(said, logits(model), rtol=1e-4, atol=1e-4)


def dropout_of_bat(method):
    model = adapted(method, "bat", bone_dropout=0.5).train()
    assert not torch.equal(logits(model), logits(model))


def a_misspelt_variant(method):
    with pytest.raises(ValueError, match="batt"):
        get_peft_model(llama(), method.config("bone", init_weights="batt"))


def rows_with_adapters_of_their_own(method):
    model = adapted(method, "bone")
    with model.disable_adapter():
        expected = logits(model)
    with torch.no_grad():
        said = model(IDS, adapter_names=["__base__", "default"]).logits
    torch.testing.assert_close(said[0], expected[0])


def scaling_a_layer(method):
    model = adapted(method, "bone", target_modules=["q_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for layer in (m for m in model.modules() if hasattr(m, "scale_layer")):
            layer.scale_layer(0.0)
    with model.disable_adapter():
        expected = logits(model)
    torch.testing.assert_close(logits(model), expected)


def adapters_of_different_dtypes(method):
    """What one active adapter computes in must not depend on the dtype of another's tensor."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8).double()), method.config("bone", target_modules=["0"])).double()
    model.add_adapter("other", method.config("bone", target_modules=["0"]))
    for theta in block(model, "default"):
        nn.init.normal_(theta, std=0.05)
        theta.data = theta.data.half()
    for theta in block(model, "other"):
        nn.init.normal_(theta, std=0.05)
        theta.data = theta.data.double()
    x = torch.randn(64, 8, dtype=torch.float64)
    said = {}
    for active in (["default"], ["other"], ["default", "other"], ["other", "default"]):
        model.base_model.set_adapter(active)
        said[tuple(active)] = model(x)
    with model.disable_adapter():
        base = model(x)
    expected = said["default",] + said["other",] - base
    for both in (("default", "other"), ("other", "default")):
        torch.testing.assert_close(said[both], expected, rtol=1e-9, atol=1e-9)


def what_bat_keeps_for_backward(method):
    model = adapted(method, "bat", target_modules=["down_proj"])
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append((t.numel(), t.data_ptr())) or t, lambda t: t):
        model(IDS, labels=IDS)
    size = model.base_model.model.model.layers[0].mlp.down_proj.weight.numel()
    own = {p.data_ptr() for p in model.parameters()}
    assert not [1 for numel, pointer in shapes if numel == size and pointer not in own]


def hooks_on_a_bat_base_layer(method):
    model = adapted(method, "bat", target_modules=["down_proj"])
    calls = []
    model.base_model.model.model.layers[0].mlp.down_proj.base_layer.register_forward_hook(lambda *_: calls.append(1))
    logits(model)
    assert calls


def products_of_a_bat_forward_in_generation(method):
    """A few tokens need no transformed weight: nothing of W's size is made."""
    model = adapted(method, "bat", nn.Sequential(nn.Linear(256, 256)), r=64, target_modules=["0"])
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and not function.is_view:
                made.append(result.numel())
            return result

    with torch.no_grad(), Watch():
        model(torch.randn(1, 256))
    assert max(made) < 256 * 256


def an_r_larger_than_the_input(method):
    with pytest.raises(ValueError, match="must be less than or equal to in_features"):
        get_peft_model(llama(), method.config("bone", r=1000, target_modules=["q_proj"]))


def a_convolution(method):
    adapted(method, "bone", nn.Sequential(nn.Conv2d(8, 8, 1)), target_modules=["0"])(torch.randn(2, 8, 4, 4))


def gpt2s_linear(method):
    adapted(method, "bone", nn.Sequential(Conv1D(8, 8)), target_modules=["0"])(torch.randn(2, 8))


def an_embedding(method):
    adapted(method, "bone", nn.Sequential(nn.Embedding(8, 8)), target_modules=["0"])(torch.arange(4))


NOT_SUPPORTED = (TypeError, "is not supported")
WRONG = (AssertionError, "")
# each with what PEFT makes of it
MISS = {
    two_variants_on_one_layer: (RuntimeError, "must match the size"),
    unmerging_bat_over_bfloat16: WRONG,
    unmerging_a_block_at_minus_one: (torch.linalg.LinAlgError, "singular"),
    unmerging_bone: WRONG,
    merging_ragged_shards_leaves_a_tied_weight_alone: WRONG,
    a_refused_merge_touches_no_layer: WRONG,
    a_module_with_two_names: WRONG,
    torchs_encoder_in_evaluation: WRONG,
    attentions_output_layer: WRONG,
    a_weighted_sum: (AttributeError, "add_weighted_adapter"),
    dropout_of_bat: WRONG,
    a_misspelt_variant: (pytest.fail.Exception, "DID NOT RAISE"),
    rows_with_adapters_of_their_own: WRONG,
    scaling_a_layer: WRONG,
    adapters_of_different_dtypes: WRONG,
    what_bat_keeps_for_backward: WRONG,
    hooks_on_a_bat_base_layer: WRONG,
    products_of_a_bat_forward_in_generation: WRONG,
    a_convolution: NOT_SUPPORTED,
    gpt2s_linear: NOT_SUPPORTED,
    an_embedding: NOT_SUPPORTED,
}
LORA = {
    unmerging_bone: WRONG,
    merging_ragged_shards_leaves_a_tied_weight_alone: WRONG,
    a_refused_merge_touches_no_layer: WRONG,
    a_module_with_two_names: WRONG,
    torchs_encoder_in_evaluation: WRONG,
    attentions_output_layer: WRONG,
    a_weighted_sum: WRONG,
}
# Faults of PEFT 0.18's Bone that its MiSS no longer has; see test_peft_018.py.
MENDED = [refusing_a_broken_adapter_of_ragged_shards, an_r_larger_than_the_input]


@pytest.mark.filterwarnings("ignore:.*tie.*")
@pytest.mark.parametrize("check", [*MISS, *MENDED], ids=lambda check: check.__name__)
def test_it_is_right_here(check):
    check(Ours)


def fails(check, method, exception, message):
    with pytest.raises(exception, match=message):
        check(method)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("check", MISS, ids=lambda check: check.__name__)
def test_it_is_wrong_in_pefts_miss(check):
    fails(check, Miss, *MISS[check])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("check", LORA, ids=lambda check: check.__name__)
def test_it_is_wrong_in_pefts_lora(check):
    fails(check, Lora, *LORA[check])
