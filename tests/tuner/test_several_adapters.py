"""Several adapters on one model: rows of a batch with their own, sums, swaps, scales."""

import pytest
import torch
from adapted_models import adapted, assert_follows_the_equations, base_model, config, logits
from conftest import llama
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from bonetune import VARIANTS, AdapterFileError, BoneLayer, InputError, hotswap_adapter
from bonetune.tuner import mixed_batch

BATCH = torch.arange(2, 50).reshape(4, 12)
NAMES = ["other", "__base__", "default", "other"]


def layers(model):
    return [module for module in model.modules() if isinstance(module, BoneLayer)]


def pair(first, second="bone", base=None, **changes):
    model = adapted(first, base, **changes)
    model.add_adapter("other", config(second, **({"r": 2} | changes)))
    return model.to(base_model().dtype if base is None else next(base.parameters()).dtype)


@torch.no_grad()
def row_by_row(model, names, batch=BATCH):
    """What the rows say one by one, each with its adapter alone."""
    said = []
    for name, row in zip(names, batch, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                said.append(model(row[None]).logits)
        else:
            model.set_adapter(name)
            said.append(model(row[None]).logits)
    model.set_adapter("default")
    return torch.cat(said)


class TestRowsOfABatch:
    @pytest.mark.parametrize("first", VARIANTS)
    @pytest.mark.parametrize("second", VARIANTS)
    def test_each_row_says_what_its_adapter_says(self, first, second):
        model = pair(first, second)
        with torch.no_grad():
            said = model(BATCH, adapter_names=NAMES).logits
        torch.testing.assert_close(said, row_by_row(model, NAMES))

    def test_adapters_on_different_layers(self):
        model = adapted("bat", target_modules=["q_proj"])
        model.add_adapter("other", config("bone", target_modules=["up_proj"]))
        model = model.double()
        with torch.no_grad():
            said = model(BATCH, adapter_names=NAMES).logits
        torch.testing.assert_close(said, row_by_row(model, NAMES))

    def test_embeddings_and_modules_trained_whole(self):
        model = pair("bat", base=llama(), target_modules=["embed_tokens", "q_proj"], modules_to_save=["lm_head"])
        with torch.no_grad():
            for i, copied in enumerate(model.base_model.model.lm_head.modules_to_save.values()):
                copied.weight.add_(0.1 * i)
            said = model(BATCH, adapter_names=NAMES).logits
        torch.testing.assert_close(said, row_by_row(model, NAMES), rtol=1e-4, atol=1e-4)

    def test_generation(self):
        model = pair("bat", "bone", base=llama(), task_type="CAUSAL_LM")
        settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        together = model.generate(input_ids=BATCH, attention_mask=torch.ones_like(BATCH), adapter_names=NAMES, **settings)
        for name, row, answer in zip(NAMES, BATCH, together, strict=True):
            alone = model.generate(input_ids=row[None], attention_mask=torch.ones(1, 12), adapter_names=[name], **settings)
            assert torch.equal(alone[0], answer), name

    @pytest.mark.parametrize("beams", [1, 3])
    def test_an_encoder_decoder_and_beam_search(self, beams):
        torch.manual_seed(0)
        sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "vocab_size": 60}
        base = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, initializer_factor=3.0)).eval()
        model = get_peft_model(base, config("bat-row", target_modules=["q", "v", "wi", "wo"], task_type="SEQ_2_SEQ_LM"))
        model.add_adapter("other", config("bone", target_modules=["q", "k"], task_type="SEQ_2_SEQ_LM"))
        model.eval()
        settings = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
        together = model.generate(input_ids=BATCH, adapter_names=NAMES, **settings)
        assert len({tuple(answer.tolist()) for answer in together}) > 1
        for name, row, answer in zip(NAMES, BATCH, together, strict=True):
            alone = model.generate(input_ids=row[None], adapter_names=[name], **settings)[0]
            assert torch.equal(alone, answer[: len(alone)]), name
            assert answer[len(alone) :].eq(0).all()

    def test_hooks_are_gone_afterwards_also_after_an_error(self):
        model = pair("bone")
        before = logits(model)
        model(BATCH, adapter_names=NAMES)
        with pytest.raises(ValueError, match="Length of `adapter_names` should be the same as the number of inputs"):
            model(BATCH, adapter_names=NAMES[:3])
        assert not any(module._forward_pre_hooks for module in model.modules())
        assert torch.equal(logits(model), before)

    def test_a_position_table_has_no_rows(self):
        torch.manual_seed(0)
        base = GPT2LMHeadModel(GPT2Config(n_embd=16, n_head=4, n_layer=1, vocab_size=60, n_positions=32)).eval()
        model = get_peft_model(base, config(target_modules=["wte", "c_attn"]))
        model(BATCH, adapter_names=["default"] * 4)
        model.add_adapter("other", config(target_modules=["wpe"]))
        with pytest.raises(ValueError, match=r"different adapters on transformer\.wpe, which is looked up by something else"):
            model.eval()(BATCH, adapter_names=NAMES)

    def test_errors(self):
        model = pair("bone")
        with pytest.raises(ValueError, match=r"non-existing adapter\(s\): another. There are default, other, and __base__"):
            model(BATCH, adapter_names=["default", "another", "other", "default"])
        with pytest.raises(TypeError, match="expected a list of str"), mixed_batch.adapters_by_row(model, "default", None):
            pass
        model.merge_adapter()
        with pytest.raises(ValueError, match="call `unmerge_adapter` first"):
            model(BATCH, adapter_names=NAMES)
        model.unmerge_adapter()
        with pytest.raises(ValueError, match="in training mode"):
            model.train()(BATCH, adapter_names=NAMES)

    def test_a_convolution(self):
        torch.manual_seed(0)
        model = get_peft_model(nn.Sequential(nn.Conv2d(8, 12, 3)), config("bat", target_modules=["0"])).eval()
        model.add_adapter("other", config("bone", target_modules=["0"]))
        x = torch.randn(4, 8, 5, 5)
        said = model(x, adapter_names=NAMES)
        for i, name in enumerate(NAMES):
            torch.testing.assert_close(said[i : i + 1], model(x[i : i + 1], adapter_names=[name]), rtol=1e-4, atol=1e-5)
        with model.disable_adapter():
            torch.testing.assert_close(said[1], model(x)[1])


class TestWeightedSums:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_the_sum_is_exact(self, variant):
        model = pair(variant, variant, r=4)
        layers(model)[0].set_scale("other", 2.0)
        model.add_weighted_adapter(["default", "other"], [0.7, -0.3], "sum")
        model = model.double()
        model.set_adapter("sum")
        said = logits(model)
        for layer in layers(model):
            layer.set_scale("default", 0.7)
            layer.set_scale("other", -0.3 * layer.bone_scaling["other"])
        model.base_model.set_adapter(["default", "other"])
        torch.testing.assert_close(said, logits(model), rtol=1e-5, atol=1e-6)

    def test_adapters_on_different_layers_and_ranks_by_layer(self, tmp_path):
        """What has no such layer adds nothing there; the result is saved and loaded by its own configuration."""
        model = adapted("bone", target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2})
        model.add_adapter(
            "other", config("bone", target_modules=r".*\.0\.(self_attn\.v_proj|mlp\.up_proj)", rank_pattern={"v_proj": 2})
        )
        model.base_model.add_weighted_adapter(["default", "other"], [1.0, 0.5], "sum")
        model = model.double()
        model.set_adapter("sum")
        said = logits(model)
        for layer in layers(model):
            layer.set_scale("other", 0.5)
        model.base_model.set_adapter(["default", "other"])
        torch.testing.assert_close(said, logits(model), rtol=1e-5, atol=1e-6)
        model.save_pretrained(tmp_path, selected_adapters=["sum"])
        again = PeftModel.from_pretrained(base_model(), tmp_path / "sum").double()
        torch.testing.assert_close(logits(again), said)

    @pytest.mark.filterwarnings("ignore:The density 1.0")
    @pytest.mark.parametrize("combination", ["ties", "dare_linear", "dare_ties", "magnitude_prune"])
    def test_pruning_everything_or_nothing(self, combination):
        model = pair("bat", "bat", r=4)
        signs = {"majority_sign_method": "frequency"}
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "all", combination, density=1.0, **signs)
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "one", combination, density=0.5)
        for layer in layers(model):
            mean = (layer.bone_block["default"] + layer.bone_block["other"]) / 2
            if "ties" not in combination:
                torch.testing.assert_close(layer.bone_block["all"].double(), mean, rtol=1e-5, atol=1e-6)
            assert (layer.bone_block["one"] == 0).float().mean() > 0.1

    def test_what_has_no_sum_is_refused_and_nothing_is_added(self):
        model = pair("bone", "bat", r=4)
        model.add_adapter("small", config("bone", r=2))
        model.add_adapter("whole", config("bone", modules_to_save=["lm_head"], target_modules=["q_proj"]))
        cases = [
            (["default", "other"], "variant", {}),
            (["default", "small"], r"on model\.layers\.0\.self_attn\.q_proj they are default bone \(r=4\), small bone", {}),
            (["default", "nobody"], "nobody does not exist; there are default, other", {}),
            (["default", "whole"], "lm_head is trained whole by whole", {}),
            (["default", "default"], "Unknown combination_type 'svd'.*`linear` is exact", {"combination_type": "svd"}),
            (["default", "default"], "needs a `density`", {"combination_type": "ties"}),
            (["default", "default"], "at most 1, got 2", {"combination_type": "ties", "density": 2}),
            (["default", "default"], "method 'most'", {"combination_type": "linear", "majority_sign_method": "most"}),
        ]
        for adapters, message, settings in cases:
            with pytest.raises(InputError, match=message):
                model.add_weighted_adapter(adapters, [1.0, 1.0], "sum", **settings)
            assert "sum" not in model.peft_config
            assert not any("sum" in layer.bone_block for layer in layers(model))
        with pytest.raises(InputError, match="2 adapters and 1 weights"):
            model.add_weighted_adapter(["default", "small"], [1.0], "sum")
        with pytest.raises(InputError, match="named other is there already"):
            model.add_weighted_adapter(["default"], [1.0], "other")


class TestHotSwap:
    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's tracer does it itself
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_a_compiled_model_says_the_other_adapters_words_without_compiling_again(self, variant, tmp_path):
        first = adapted(variant, llama())
        torch.manual_seed(5)
        second = get_peft_model(llama(), config(variant)).eval()
        second.save_pretrained(tmp_path)
        compilations = []

        def backend(graph, _):
            compilations.append(graph)
            return graph.forward

        torch.compiler.reset()
        compiled = torch.compile(first, backend=backend)
        said = logits(compiled)
        count = len(compilations)
        assert count > 0
        tensors = {n: p for n, p in first.named_parameters() if "bone_block" in n}
        hotswap_adapter(compiled, tmp_path)
        torch.testing.assert_close(logits(compiled), logits(second))
        assert (logits(compiled) - said).abs().max() > 0.1
        assert len(compilations) == count
        assert all(p is tensors[n] for n, p in first.named_parameters() if n in tensors)

    def test_a_model_of_transformers_with_adapters_of_its_own(self, tmp_path):
        model = llama()
        model.add_adapter(config("bat"))
        second = get_peft_model(llama(), config("bat")).eval()
        second.save_pretrained(tmp_path)
        hotswap_adapter(model, tmp_path)
        torch.testing.assert_close(logits(model), logits(second))

    @pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
    def test_an_embeddings_swap_leaves_what_another_adapter_merged(self, tmp_path):
        model = adapted("bone", llama(), target_modules=["embed_tokens"])
        model.save_pretrained(tmp_path)
        model.add_adapter("other", config("bat", target_modules=["embed_tokens"]))
        model.merge_adapter(["other"])
        merged = model.base_model.model.model.embed_tokens.base_layer.weight.clone()
        hotswap_adapter(model, tmp_path)
        assert torch.equal(model.base_model.model.model.embed_tokens.base_layer.weight, merged)

    def test_what_does_not_fit_is_refused_and_changes_nothing(self, tmp_path):
        model = adapted("bat", llama())
        said = logits(model)
        for i, other in enumerate([{"variant": "bat-row"}, {"variant": "bat", "r": 2}]):
            get_peft_model(llama(), config(**other)).save_pretrained(tmp_path / str(i))
            with pytest.raises(InputError, match=r"on model\.layers\.0\.self_attn\.q_proj the model has bat \(r=4\) and"):
                hotswap_adapter(model, tmp_path / str(i))
        get_peft_model(llama(), config("bat", target_modules=["q_proj"])).save_pretrained(tmp_path / "few")
        with pytest.raises(AdapterFileError, match=r"k_proj\.bone_block\.default is missing"):
            hotswap_adapter(model, tmp_path / "few")
        with pytest.raises(InputError, match="no Bone adapter named 'other' to swap; it has default"):
            hotswap_adapter(model, tmp_path / "few", "other")
        assert torch.equal(logits(model), said)
        model.merge_adapter()
        with pytest.raises(InputError, match="is merged: call `unmerge_adapter`"):
            hotswap_adapter(model, tmp_path / "few")


def test_scaling():
    model = adapted("bat")
    layers = [m for m in model.modules() if isinstance(m, BoneLayer)]
    for layer in layers:
        layer.scale_layer(0.5)
    half = logits(model)
    for layer in layers:
        layer.unscale_layer(0.5)
    assert_follows_the_equations(model)
    for layer in layers:
        layer.bone_block["default"].data.mul_(0.5)
    torch.testing.assert_close(logits(model), half)
    for layer in layers:
        layer.set_scale("default", 0.0)
    torch.testing.assert_close(logits(model), logits(base_model()))


def test_peft_mixed_model_is_refused():
    """PEFT's list of methods that it mixes is closed."""
    with pytest.raises(ValueError, match=r"'BONE' is not compatible with the `PeftMixedModel`. Compatible types are"):
        get_peft_model(llama(), config(), mixed=True)
