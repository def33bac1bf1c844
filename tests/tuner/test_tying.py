"""`ensure_weight_tying`: one tensor adapts an embedding and what is tied to it, and the merged matrix is one again."""

import pytest
import torch
from adapted_models import IDS, config, logits
from conftest import llama
from peft import PeftModel, get_peft_model
from transformers import T5Config, T5ForConditionalGeneration

from bonetune import VARIANTS, BoneLayer, InputError, TargetError

# PEFT saves embeddings that are targeted
pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens", "q_proj"], r".*(lm_head|q_proj)"])
def test_they_stay_tied(variant, targets, tmp_path):
    base = llama(tie_word_embeddings=True)
    model = get_peft_model(base, config(variant, target_modules=targets, ensure_weight_tying=True)).eval()
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    assert embedding.bone_block["default"] is head.bone_block["default"]
    expected, tied = logits(model), embedding.base_layer.weight
    model.merge_adapter()
    assert embedding.base_layer.weight is head.base_layer.weight is not tied
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-4)
    model.unmerge_adapter()
    assert embedding.base_layer.weight is head.base_layer.weight is tied
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(llama(tie_word_embeddings=True), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), expected)
    plain = model.merge_and_unload()
    assert plain.config.tie_word_embeddings
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    plain.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(type(plain).from_pretrained(tmp_path / "merged")), expected, rtol=1e-3, atol=1e-4)


def test_both_learn_through_the_one_tensor():
    model = get_peft_model(
        llama(tie_word_embeddings=True), config("bone", target_modules=["lm_head"], ensure_weight_tying=True)
    )
    model(IDS, labels=IDS).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 1
    unseen = [i for i in range(320) if i not in IDS]
    assert trained[0].grad[:, unseen].ne(0).any()  # by the head
    assert trained[0].grad.ne(0).any()


def test_a_second_adapter_is_tied_too_and_saved(tmp_path):
    settings = {"target_modules": ["lm_head", "q_proj"], "ensure_weight_tying": True}
    model = get_peft_model(llama(tie_word_embeddings=True), config("bone", **settings))
    model.add_adapter("second", config("bat", **settings))
    model.add_weighted_adapter(["second"], [0.5], "weighted")
    inner = model.base_model.model
    for name in ("second", "weighted"):
        assert inner.lm_head.bone_block[name] is inner.model.embed_tokens.bone_block[name]
    model.set_adapter("second")
    expected = logits(model.eval())
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    again = PeftModel.from_pretrained(llama(tie_word_embeddings=True), tmp_path / "second")
    torch.testing.assert_close(logits(again), expected)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("targets", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_a_loaded_adapter_is_tied_and_trains_on_as_one(targets, low_cpu_mem_usage, tmp_path):
    settings = {"target_modules": ["q_proj"], "ensure_weight_tying": True} | targets
    get_peft_model(llama(tie_word_embeddings=True), config("bone", **settings)).save_pretrained(tmp_path / "a")
    fresh = llama(tie_word_embeddings=True)
    model = PeftModel.from_pretrained(fresh, tmp_path / "a", is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "b")
    again = PeftModel.from_pretrained(llama(tie_word_embeddings=True), tmp_path / "b")
    torch.testing.assert_close(logits(again.eval()), logits(model.eval()))


def test_a_tie_outlives_another_dtype():
    base = llama(tie_word_embeddings=True)
    model = get_peft_model(base, config("bone", target_modules=["lm_head"], ensure_weight_tying=True))
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    head, embedding = base.lm_head.base_layer.weight, base.model.embed_tokens.base_layer.weight
    assert head is embedding
    assert torch.equal(head, llama(tie_word_embeddings=True).bfloat16().lm_head.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank_pattern": {"lm_head": 8}}, r"lm_head r=8 and model\.embed_tokens r=4"),
        ({"exclude_modules": ["embed_tokens"]}, r"adapts model\.embed_tokens, which `exclude_modules` leaves out"),
    ],
)
def test_what_cannot_be_one_is_refused_first(changes, message):
    base = llama(tie_word_embeddings=True)
    with pytest.raises(InputError, match=message):
        get_peft_model(base, config(target_modules=["lm_head", "q_proj"], ensure_weight_tying=True, **changes))
    assert not any(isinstance(m, BoneLayer) for m in base.modules())


def test_modules_to_save_of_a_second_adapter_are_refused():
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True}
    model = get_peft_model(llama(tie_word_embeddings=True), config(**settings))
    with pytest.warns(UserWarning, match="no tied modules"), pytest.raises(InputError, match="works for one adapter"):
        model.add_adapter("second", config(**settings))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_embeddings_that_are_one_matrix_in_t5():
    """Its `shared` is never called; adapters on the others part what one file can hold only as one."""
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4, "vocab_size": 60}
    with pytest.raises(TargetError, match=r"shared is never called: decoder\.embed_tokens, encoder\.embed_tokens have its"):
        get_peft_model(T5ForConditionalGeneration(T5Config(**sizes)), config(target_modules=["shared"]))
    parted = get_peft_model(T5ForConditionalGeneration(T5Config(**sizes)), config(target_modules=["embed_tokens"]))
    with pytest.warns(UserWarning, match="had one weight have different ones after merging"):
        parted.merge_and_unload()
    base = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    model = get_peft_model(base, config(target_modules=["embed_tokens"], ensure_weight_tying=True)).eval()
    blocks = {id(m.bone_block["default"]) for m in model.modules() if isinstance(m, BoneLayer)}
    assert len(blocks) == 1
    with torch.no_grad():
        expected = model(input_ids=IDS, decoder_input_ids=IDS).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=IDS, decoder_input_ids=IDS).logits, expected, rtol=1e-3, atol=1e-4)
    assert merged.shared.weight is merged.encoder.embed_tokens.weight is merged.decoder.embed_tokens.weight


def test_modules_to_save():
    model = get_peft_model(
        llama(tie_word_embeddings=True),
        config(target_modules=["q_proj"], modules_to_save=["lm_head"], ensure_weight_tying=True),
    )
    inner = model.base_model.model
    assert inner.lm_head.modules_to_save["default"].weight is inner.model.embed_tokens.modules_to_save["default"].weight
