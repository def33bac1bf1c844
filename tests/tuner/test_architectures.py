"""Tiny models of the architectures that people adapt: default targets, all Linear layers, experts, embeddings."""

import functools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, convert_to_lora, get_peft_model, set_peft_model_state_dict
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors.torch import load_file
from torch import nn

from bonetune import VARIANTS, BoneConfig, BoneEmbedding, BoneLayer, BoneModel, InputError, TargetError
from bonetune.ops import Update, merge
from bonetune.tuner.parameter import ParamWrapper

IDS = torch.arange(2, 26).reshape(2, 12)
TEXT = {"input_ids": IDS, "labels": IDS}
SENTENCES = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": torch.tensor([0, 2])}
QUESTIONS = {"input_ids": IDS, "labels": IDS[:, :8] + 20}
IMAGES = {"pixel_values": torch.arange(4 * 4 * 16 * 16).sin().reshape(4, 4, 16, 16), "labels": torch.tensor([0, 1, 2, 0])}

SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VOCABULARY = {"vocab_size": 96, "max_position_embeddings": 64, "initializer_range": 0.1}
DECODER = SIZES | VOCABULARY | SPECIAL | {"num_key_value_heads": 2}
MIXTURE = DECODER | {"num_experts_per_tok": 2}
CLASSIFIER = {"num_labels": 3, "initializer_range": 0.1}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 64, "vocab_size": 96, "initializer_range": 0.1}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 62, "init_std": 0.1, "vocab_size": 96}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 96}
VIT = {"image_size": 16, "patch_size": 4, "num_channels": 4}
EXPERTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


@dataclass
class Architecture:
    """A class and a configuration of transformers, what the model is called with, and what its adapters need besides."""

    model: str
    config: str
    sizes: dict[str, Any]
    inputs: dict[str, torch.Tensor] = field(default_factory=lambda: TEXT)
    settings: dict[str, Any] = field(default_factory=dict)
    targets: Any = None  # tried besides "all-linear"

    def __call__(self, **changes):
        torch.manual_seed(0)
        return getattr(transformers, self.model)(getattr(transformers, self.config)(**(self.sizes | changes))).eval()


ARCHITECTURES = {
    "Llama": Architecture("LlamaForCausalLM", "LlamaConfig", DECODER),
    "Mistral": Architecture("MistralForCausalLM", "MistralConfig", DECODER),
    "Qwen2": Architecture("Qwen2ForCausalLM", "Qwen2Config", DECODER),
    "Qwen3": Architecture("Qwen3ForCausalLM", "Qwen3Config", DECODER | {"head_dim": 8}),
    "Gemma2": Architecture("Gemma2ForCausalLM", "Gemma2Config", DECODER | {"head_dim": 8}),
    "Gemma3": Architecture("Gemma3ForCausalLM", "Gemma3TextConfig", DECODER | {"head_dim": 8}),
    "GPT-2": Architecture("GPT2LMHeadModel", "GPT2Config", GPT2 | SPECIAL),
    "GPT-NeoX": Architecture("GPTNeoXForCausalLM", "GPTNeoXConfig", SIZES | VOCABULARY | SPECIAL),
    "OPT": Architecture("OPTForCausalLM", "OPTConfig", SIZES | SPECIAL | OPT),
    "BERT": Architecture(
        "BertForSequenceClassification",
        "BertConfig",
        SIZES | VOCABULARY | CLASSIFIER,
        inputs=SENTENCES,
        settings={"task_type": "SEQ_CLS"},
    ),
    "RoBERTa": Architecture(
        "RobertaForSequenceClassification",
        "RobertaConfig",
        SIZES | VOCABULARY | SPECIAL | CLASSIFIER,
        inputs=SENTENCES,
        settings={"task_type": "SEQ_CLS"},
    ),
    "T5": Architecture(
        "T5ForConditionalGeneration",
        "T5Config",
        T5 | {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1},
        inputs=QUESTIONS,
        settings={"task_type": "SEQ_2_SEQ_LM"},
    ),
    "ViT": Architecture(
        "ViTForImageClassification",
        "ViTConfig",
        SIZES | VIT | CLASSIFIER,
        inputs=IMAGES,
        settings={"modules_to_save": ["classifier"]},
        targets=["q_proj", "v_proj", "patch_embeddings.projection"],
    ),
    "Mixtral": Architecture("MixtralForCausalLM", "MixtralConfig", MIXTURE | {"num_local_experts": 4}, settings=EXPERTS),
    "Qwen3-MoE": Architecture(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        MIXTURE | {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 24},
        settings=EXPERTS,
    ),
    # its experts are stored transposed, (number, in, out)
    "gpt-oss": Architecture(
        "GptOssForCausalLM", "GptOssConfig", MIXTURE | {"head_dim": 8, "num_local_experts": 4}, settings=EXPERTS
    ),
}
MIXTURES = ["Mixtral", "Qwen3-MoE", "gpt-oss"]
WITH_EVERY_VARIANT = {"Llama", "GPT-2", "T5", "Mixtral"}


def cases():
    for name, architecture in ARCHITECTURES.items():
        for targets in (architecture.targets, "all-linear"):
            every = name in WITH_EVERY_VARIANT and targets == "all-linear"
            for variant in VARIANTS if every else ("bone", "bat"):
                how = {"all-linear": "all-linear"}.get(str(targets), "default" if targets is None else "listed")
                yield pytest.param(name, targets, variant, id=f"{name}-{how}-{variant}")


def config(variant="bone", **changes):
    settings = {"r": 4, "variant": variant, "mini_r": 2, "init_weights": False}
    return BoneConfig(**(settings | changes))


def adapted(name, variant="bone", base=None, scale=0.3, **changes):
    """A scale at which no softmax saturates, and so makes much of a rounding error."""
    architecture = ARCHITECTURES[name]
    base = base or architecture()
    torch.manual_seed(1)
    model = get_peft_model(base, config(variant, **(architecture.settings | changes))).eval()
    for layer in layers(model):
        layer.bone_block["default"].data.mul_(scale)
    return model


@torch.no_grad()
def says(name, model):
    return model(**ARCHITECTURES[name].inputs).logits


@functools.cache
def base_says(name, **sizes):
    return says(name, ARCHITECTURES[name](**sizes))


def losses_of_training(name, model, steps=6):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(**ARCHITECTURES[name].inputs).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def copied(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    return {name for name in after if not torch.equal(after[name], before[name])}


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)


def layers(model):
    return [module for module in model.modules() if isinstance(module, BoneLayer)]


@pytest.mark.parametrize(("name", "targets", "variant"), list(cases()))
class TestEachArchitecture:
    def test_it_starts_at_the_base_model_and_learns_in_the_adapter_alone(self, name, targets, variant):
        model = adapted(name, variant, target_modules=targets, init_weights=True)
        assert torch.equal(says(name, model), base_says(name))
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        heads = {"classifier"} if name in ("BERT", "RoBERTa", "ViT") else set()
        assert {n for n in trained if "bone_block" not in n and "modules_to_save" not in n} == set()
        assert {n.split(".")[2] for n in trained if "modules_to_save" in n} == heads
        before = copied(model)
        losses = losses_of_training(name, model)
        assert losses[-1] < 0.97 * losses[0]
        assert changed(model, before) == trained

    def test_it_travels_and_merges(self, name, targets, variant, tmp_path):
        model = adapted(name, variant, target_modules=targets)
        expected = says(name, model)
        assert (expected - base_says(name)).abs().max() > 0.01
        model.save_pretrained(tmp_path)
        assert torch.equal(says(name, PeftModel.from_pretrained(ARCHITECTURES[name](), tmp_path)), expected)

        before = copied(model)
        model.merge_adapter(safe_merge=True)
        assert len(changed(model, before)) == len(layers(model))
        close(says(name, model), expected)
        model.unmerge_adapter()
        assert not changed(model, before)

        plain, base = model.merge_and_unload(), ARCHITECTURES[name]()
        assert type(plain) is type(base)
        assert plain.state_dict().keys() == base.state_dict().keys()
        close(says(name, plain), expected)


@pytest.mark.parametrize("model_type", TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING)
def test_defaults_for_each_architecture_that_has_lora_s(model_type):
    expected = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[model_type]
    assert expected
    assert BoneModel.target_module_mapping[model_type] == expected


def test_an_architecture_without_defaults_is_an_error():
    with pytest.raises(InputError, match="no default target modules for models of type 'vit'"):
        adapted("ViT", target_modules=None)


@pytest.mark.parametrize("name", ["GPT-2", "Mixtral", "gpt-oss"])
def test_transformers_own_adapters(name, tmp_path):
    model, base = ARCHITECTURES[name](), base_says(name)
    torch.manual_seed(1)
    model.add_adapter(config("bat", **ARCHITECTURES[name].settings, target_modules="all-linear"), "mine")
    expected = says(name, model)
    model.save_pretrained(tmp_path)
    again = ARCHITECTURES[name]()
    again.load_adapter(str(tmp_path), "mine")
    assert torch.equal(says(name, again), expected)
    again.disable_adapters()
    assert torch.equal(says(name, again), base)
    again.enable_adapters()
    again.delete_adapter("mine")
    assert torch.equal(says(name, again), base)


@pytest.mark.parametrize("name", ["GPT-2", "T5", "BERT"])
def test_each_row_its_own_adapter(name):
    """With a head of its own too, where there is one. (PEFT can do that only for a head that is a single layer.)"""
    architecture = ARCHITECTURES[name]
    model = adapted(name, "bat", target_modules="all-linear")
    model.add_adapter("other", config("bone", **architecture.settings, target_modules="all-linear"))
    if name == "BERT":
        model.base_model.model.classifier.modules_to_save["other"].weight.data.neg_()
    alone = {}
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        alone[adapter] = says(name, model)
    with model.disable_adapter():
        alone["__base__"] = says(name, model)
    for names in (["other", "default"], ["__base__", "other"]):
        with torch.no_grad():
            together = model(**architecture.inputs, adapter_names=names).logits
        close(together, torch.stack([alone[adapter][row] for row, adapter in enumerate(names)]))


class TestGeneration:
    """An encoder-decoder: beam search repeats the rows, but only those of the decoder."""

    INPUT = torch.arange(2, 38).reshape(3, 12)

    def answers(self, model, rows=slice(None), **settings):
        ids = self.INPUT[rows]
        return model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6, do_sample=False, **settings
        )

    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("beams", [1, 3])
    def test_the_merged_model_gives_the_same_answers(self, variant, beams):
        model = adapted("T5", variant, scale=1, target_modules="all-linear")
        expected = self.answers(model, num_beams=beams)
        assert not torch.equal(expected, self.answers(ARCHITECTURES["T5"](), num_beams=beams))
        assert torch.equal(self.answers(model, num_beams=beams, use_cache=False), expected)
        assert torch.equal(self.answers(model.merge_and_unload(), num_beams=beams), expected)

    @pytest.mark.parametrize("beams", [1, 3])
    def test_each_row_its_own_adapter(self, beams):
        model = adapted("T5", "bone", scale=1, target_modules="all-linear")
        model.add_adapter("other", config("bat", task_type="SEQ_2_SEQ_LM", target_modules="all-linear"))
        alone = []
        for row, name in enumerate(["default", "other"]):
            model.set_adapter(name)
            alone.append(self.answers(model, [row], num_beams=beams))
        with model.disable_adapter():
            alone.append(self.answers(model, [2], num_beams=beams))
        together = self.answers(model, num_beams=beams, adapter_names=["default", "other", "__base__"])
        assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("name", MIXTURES)
class TestExperts:
    @torch.no_grad()
    def by_the_equations(self, name, model):
        """The base model with each expert's matrix merged on its own, in float64."""
        plain = ARCHITECTURES[name]()
        for key, layer in model.base_model.model.named_modules():
            if isinstance(layer, BoneLayer):
                parameter = getattr(plain.get_submodule(key.replace(".base_layer", "")), layer.weight_name)
                blocks, spec = layer.bone_block["default"].double(), layer.bone_spec["default"]
                stored = [(parameter, blocks)] if parameter.dim() == 2 else zip(parameter, blocks, strict=True)
                for matrix, block in stored:
                    transposed = name == "gpt-oss" and parameter.dim() == 3
                    weight = (matrix.T if transposed else matrix).double()
                    updated = merge(weight, [Update(block, spec)])
                    matrix.copy_(updated.T if transposed else updated)
        return plain

    @pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
    def test_each_expert_is_updated_by_the_equations(self, name, implementation):
        for variant in VARIANTS:
            base = ARCHITECTURES[name]()
            base.set_experts_implementation(implementation)
            model = adapted(name, variant, base, target_modules=["q_proj"])
            assert sum(isinstance(layer, ParamWrapper) for layer in layers(model)) == 4
            close(says(name, model), says(name, self.by_the_equations(name, model)))

    def test_the_router_is_left_alone(self, name):
        model = adapted(name, target_modules="all-linear")
        routers = [n for n, m in model.named_modules() if type(m).__name__.endswith("Router")]
        assert len(routers) == 2
        assert not any(p.requires_grad for n in routers for p in model.get_submodule(n).parameters())
        assert not any(isinstance(m, BoneLayer) for n in routers for m in model.get_submodule(n).modules())

    def test_experts_alone(self, name):
        model = adapted(name, target_modules=[])
        assert {type(layer) for layer in layers(model)} == {ParamWrapper}

    def test_two_adapters(self, name, tmp_path):
        model = adapted(name, "bat", target_modules="all-linear")
        model.add_adapter("other", config("bone", **EXPERTS, r=8, target_modules="all-linear"))
        first = says(name, model)
        model.base_model.set_adapter(["default", "other"])
        expected = says(name, model)
        assert (expected - first).abs().max() > 0.01
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(ARCHITECTURES[name](), tmp_path, low_cpu_mem_usage=True)
        again.load_adapter(tmp_path / "other", "other", low_cpu_mem_usage=True)
        again.base_model.set_adapter(["default", "other"])
        assert torch.equal(says(name, again.eval()), expected)
        model.merge_adapter()
        close(says(name, model), expected)
        model.unmerge_adapter()
        model.delete_adapter("other")
        model.set_adapter("default")
        assert torch.equal(says(name, model), first)
        assert torch.equal(says(name, model.unload()), base_says(name))

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_gradient_checkpointing_changes_nothing(self, name, reentrant):
        gradients = []
        for checkpointing in (False, True):
            model = adapted(name, "bat", target_modules="all-linear").train()
            if checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
                model.enable_input_require_grads()
            model(**TEXT).loss.backward()
            gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        for key, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-5, atol=1e-7, msg=key)

    def test_rows_with_different_adapters_are_refused(self, name):
        with pytest.raises(ValueError, match="Rows of one batch cannot have different adapters on a parameter"):
            adapted(name, target_modules=[])(IDS, adapter_names=["default", "__base__"])


# name of an architecture, changes of its sizes, embeddings to target; each with r dividing both of its sides
EMBEDDINGS = [
    pytest.param("Llama", {}, ["embed_tokens"], id="Llama"),
    pytest.param("Llama", {"tie_word_embeddings": True}, ["embed_tokens"], id="Llama tied"),
    pytest.param("Gemma2", {}, ["embed_tokens"], id="Gemma2 scaled and tied"),
    pytest.param("Gemma3", {}, ["embed_tokens"], id="Gemma3 scaled and tied"),
    pytest.param("GPT-2", {}, ["wte", "wpe"], id="GPT-2 tied"),
    pytest.param("T5", {}, ["embed_tokens", "relative_attention_bias"], id="T5 tied"),
]


@pytest.mark.filterwarnings("ignore:.*tie.*")
@pytest.mark.parametrize(("name", "sizes", "targets"), EMBEDDINGS)
class TestEmbeddings:
    @torch.no_grad()
    def by_the_equations(self, name, sizes, model):
        """The base model with W' in the embeddings, but not in a head that was tied to one."""
        plain = ARCHITECTURES[name](**sizes)
        for key, layer in model.base_model.model.named_modules():
            if isinstance(layer, BoneLayer):
                embedding = plain.get_submodule(key)
                update = Update(layer.bone_block["default"].double(), layer.bone_spec["default"])
                embedding.weight = nn.Parameter(merge(embedding.weight.double(), [update]).float())
        return plain

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_lookups_are_those_of_the_updated_weight(self, name, sizes, targets, variant):
        model = adapted(name, variant, ARCHITECTURES[name](**sizes), target_modules=targets)
        assert {type(layer) for layer in layers(model)} == {BoneEmbedding}
        close(says(name, model), says(name, self.by_the_equations(name, sizes, model)))

    @pytest.mark.parametrize("variant", ["bone", "bat"])
    def test_it_learns_in_the_adapter_alone(self, name, sizes, targets, variant):
        model = adapted(name, variant, ARCHITECTURES[name](**sizes), target_modules=targets, init_weights=True)
        assert torch.equal(says(name, model), base_says(name, **sizes))
        before = copied(model)
        losses = losses_of_training(name, model, steps=12)
        assert losses[-1] < 0.97 * losses[0]
        assert {key.rsplit(".", 2)[1] for key in changed(model, before)} == {"bone_block"}

    @pytest.mark.filterwarnings("ignore:Embeddings that had one weight:UserWarning")  # T5's, in memory
    @pytest.mark.parametrize("variant", ["bone", "bat"])
    def test_it_travels_and_merges(self, name, sizes, targets, variant, tmp_path):
        model = adapted(name, variant, ARCHITECTURES[name](**sizes), target_modules=targets)
        expected = says(name, model)
        # without this, PEFT writes the frozen embedding into the file too
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        assert all(key.endswith("bone_block") for key in load_file(tmp_path / "adapter/adapter_model.safetensors"))
        again = PeftModel.from_pretrained(ARCHITECTURES[name](**sizes), tmp_path / "adapter")
        assert torch.equal(says(name, again), expected)

        before = copied(model)
        model.merge_adapter(safe_merge=True)
        close(says(name, model), expected)
        model.unmerge_adapter()
        assert not changed(model, before)
        plain = model.merge_and_unload()
        close(says(name, plain), expected)
        if name != "T5":  # a head that was tied to the embedding is its own now, also on disk
            plain.save_pretrained(tmp_path / "merged")
            close(says(name, type(plain).from_pretrained(tmp_path / "merged")), expected)


def test_peft_writes_the_frozen_embedding_too_and_reads_it_back(tmp_path):
    model = adapted("Llama", "bat", target_modules=["embed_tokens"])
    with pytest.warns(UserWarning, match="`save_embedding_layers` to `True`"):
        model.save_pretrained(tmp_path)
    assert sum("base_layer.weight" in key for key in load_file(tmp_path / "adapter_model.safetensors")) == 1
    assert torch.equal(says("Llama", PeftModel.from_pretrained(ARCHITECTURES["Llama"](), tmp_path)), says("Llama", model))


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_embedding_that_counts_positions_is_a_parameter_to_target(variant):
    """OPT's `embed_positions` is called with an attention mask: what it looks up is its own affair."""
    with pytest.raises(TargetError, match=r"OPTLearnedPositionalEmbedding.*target_parameters"):
        adapted("OPT", target_modules=["q_proj", "embed_positions"])
    model = adapted("OPT", variant, target_modules=[], target_parameters=["embed_positions.weight"])
    expected = says("OPT", model)
    assert (expected - base_says("OPT")).abs().max() > 0.01
    close(says("OPT", model.merge_and_unload()), expected)


def test_a_scaled_embedding_with_a_row_of_its_own_is_a_parameter_to_target():
    """T5Gemma 2 has one: for the token that ends an image, it returns another parameter than its weight's row."""

    class Embedding(nn.Embedding):
        def __init__(self):
            super().__init__(12, 8)
            self.embed_scale = torch.tensor(2.0)
            self.end_of_image = nn.Parameter(torch.ones(8))

        def forward(self, ids):
            return torch.where((ids == 5).unsqueeze(-1), self.end_of_image, super().forward(ids) * self.embed_scale)

    with pytest.raises(TargetError, match=r"0 \(Embedding\) is not supported"):
        get_peft_model(nn.Sequential(Embedding()), config(target_modules=["0"]))
    model = get_peft_model(nn.Sequential(Embedding()), config(target_modules=[], target_parameters=["0.weight"]))
    expected = model(torch.arange(12))
    assert (expected[5] == 1).all()
    close(model.merge_and_unload()(torch.arange(12)), expected)


@pytest.mark.parametrize("variant", ["bone", "bat-left"])
@pytest.mark.parametrize(
    ("name", "tied"), [("Llama", False), ("Llama", True), ("Gemma3", True), ("GPT-2", True)], ids=lambda value: str(value)
)
def test_trainable_tokens(name, tied, variant, tmp_path):
    """PEFT trains those rows itself, beside the adapter; tied, in the head too."""
    sizes = {"tie_word_embeddings": tied} if name == "Llama" else {}
    tokens = [3, 5, 30]
    settings = {"target_modules": "all-linear", "trainable_token_indices": tokens, "init_weights": True}
    model = adapted(name, variant, ARCHITECTURES[name](**sizes), **settings)
    assert torch.equal(says(name, model), base_says(name, **sizes))
    losses = losses_of_training(name, model)
    assert losses[-1] < 0.97 * losses[0]
    expected, embedding = says(name, model), ARCHITECTURES[name](**sizes).get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    assert torch.equal(says(name, PeftModel.from_pretrained(ARCHITECTURES[name](**sizes), tmp_path)), expected)
    before = copied(model)
    model.merge_adapter()
    close(says(name, model), expected)
    model.unmerge_adapter()
    assert not changed(model, before)
    plain = model.merge_and_unload()
    close(says(name, plain), expected)
    moved = (plain.get_input_embeddings().weight != embedding).any(1)
    # 30 is not in the text: without a tied head, no gradient reaches it
    assert moved.nonzero().flatten().tolist() == (tokens if tied else tokens[:2])


class TestConversionToLoRA:
    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize(
        ("name", "targets"), [("Llama", ["q_proj", "o_proj", "up_proj"]), ("GPT-2", "all-linear")], ids=["Llama", "GPT-2"]
    )
    def test_full_rank_says_the_same(self, name, targets, variant):
        model = adapted(name, variant, target_modules=targets)
        lora, tensors = convert_to_lora(model, rank=4 if variant in ("bone", "mini") else 32)
        lora.fan_in_fan_out = name == "GPT-2"
        converted = get_peft_model(ARCHITECTURES[name](), lora).eval()
        assert not set_peft_model_state_dict(converted, tensors).unexpected_keys
        torch.testing.assert_close(says(name, converted), says(name, model), rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize(
        "settings", [{"target_modules": ["embed_tokens"]}, {"target_modules": [], **EXPERTS}], ids=["embedding", "experts"]
    )
    def test_what_is_not_linear_is_refused(self, settings):
        model = get_peft_model(ARCHITECTURES["Mixtral"](), config(**settings))
        with pytest.raises(TypeError, match="do not support LoRA conversion"):
            convert_to_lora(model, rank=4)
