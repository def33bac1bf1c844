"""The loss against the model's own logits and a plain cross-entropy, in float64 wherever the architecture runs in it."""

import math
from types import SimpleNamespace

import pytest
import torch
from adapted_models import adapted
from conftest import llama
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    ModernBertDecoderConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import CausalLMOutput

import bonetune.losses.chunks
from bonetune.data.examples import IGNORED
from bonetune.errors import InputError
from bonetune.losses import check_loss, classification_loss, completion_loss, example_losses, label_loss

VOCABULARY = 96
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
GPT2_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1}
OPT_SIZES = {"ffn_dim": 48, "word_embed_proj_dim": 16, "max_position_embeddings": 64, "dropout": 0.0}
MODERN = {"embedding_dropout": 0.0, "attention_dropout": 0.0, "mlp_dropout": 0.0, "cls_token_id": 0, "sep_token_id": 1}
LLAMA4 = {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2}
ARCHITECTURES = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama, tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gpt2": GPT2Config(**GPT2_SIZES, initializer_range=0.2),
    "opt, whose head calls the body's decoder": OPTConfig(**SIZES, **OPT_SIZES),
    "gpt-neox": GPTNeoXConfig(**SIZES),
    "gemma2, softcapped": Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0, attn_implementation="eager"),
    "cohere, scaled": CohereConfig(**SIZES, logit_scale=0.3),
    "granite, scaled": GraniteConfig(**SIZES, logits_scaling=3.0),
    "phi, head with bias": PhiConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "modernbert-decoder, whose head is its decoder": ModernBertDecoderConfig(**SIZES, **MODERN),
    "llama4, whose body has no name": Llama4TextConfig(**SIZES, **LLAMA4),
    "mamba": MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=VOCABULARY, state_size=4),
}
FLOAT32 = ("mixtral", "mamba")  # what they compute with is not there in float64


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """4 positions at a time, so that everything here takes several chunks."""
    monkeypatch.setattr(bonetune.losses.chunks, "_positions_at_once", lambda model: 4)


def batch():
    ids = torch.randint(2, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    labels = ids.clone()
    labels[0, :7] = labels[1, :4] = labels[2, :10] = labels[1, 9:] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def plain_loss(model, input_ids, attention_mask, labels):
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1].double()
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_loss_and_gradients(model, inputs, rtol=1e-7, atol=1e-10):
    expected, mine = plain_loss(model, **inputs), completion_loss(model, **inputs)
    torch.testing.assert_close(mine.double(), expected, rtol=rtol, atol=atol)
    wanted, found = gradients(model, expected), gradients(model, mine)
    assert found.keys() == wanted.keys()
    assert max(g.abs().max() for g in wanted.values()) > 1e-3
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol)


def of(architecture):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[architecture]).eval()
    return model if architecture in FLOAT32 else model.double()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_value_and_gradients_are_those_of_the_models_own_logits(architecture):
    precision = {"rtol": 1e-4, "atol": 1e-6} if architecture in FLOAT32 else {}
    assert_same_loss_and_gradients(of(architecture), batch(), **precision)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_made_for_supervised_positions_only_and_few_at_a_time(architecture):
    model, seen = of(architecture), []
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(output.shape[:-1].numel()))
    inputs = batch()
    completion_loss(model, **inputs)
    assert sum(seen) == (inputs["labels"][:, 1:] != IGNORED).sum()
    assert max(seen) == 4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_losses_of_the_examples_are_those_of_each_alone(architecture):
    model, inputs = of(architecture), batch()
    inputs["labels"][0] = IGNORED  # nothing to predict there
    alone = [
        completion_loss(model, **{name: t[i : i + 1] for name, t in inputs.items()}, supervised=1)
        for i in range(len(inputs["labels"]))
    ]
    torch.testing.assert_close(
        example_losses(model, **inputs).double(), torch.stack(alone).detach().double(), rtol=1e-5, atol=1e-6
    )
    inputs["labels"][:] = IGNORED
    assert not example_losses(model, **inputs).any()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_check_agrees_and_changes_nothing(architecture):
    model = of(architecture).train()
    model.get_output_embeddings().eval()
    modes = [module.training for module in model.modules()]
    assert check_loss(model, VOCABULARY)
    assert [module.training for module in model.modules()] == modes
    assert "forward" not in model.__dict__


def peft(kind):
    tied = "tied" in kind
    base = llama(vocab_size=VOCABULARY, tie_word_embeddings=tied).double()
    if kind == "bone on the head":
        return adapted(base=base, target_modules=["q_proj", "lm_head"])
    if kind == "bone, head trained whole":
        return adapted(base=base, target_modules=["q_proj"], modules_to_save=["lm_head"])
    if kind == "bone, some rows of tied embeddings":
        return adapted(base=base, target_modules=["q_proj"], trainable_token_indices=[3, 5, 7])
    if kind == "lora on the head":
        config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM", init_lora_weights=False)
        return get_peft_model(base, config).double()
    assert kind == "tied embeddings trained whole"
    for name, parameter in base.named_parameters():
        parameter.requires_grad_("embed" in name)
    return base


PEFT_KINDS = (
    "bone on the head",
    "bone, head trained whole",
    "bone, some rows of tied embeddings",
    "lora on the head",
    "tied embeddings trained whole",
)


@pytest.mark.parametrize("kind", PEFT_KINDS)
def test_a_trained_head_gets_its_gradient(kind):
    assert_same_loss_and_gradients(peft(kind), batch())


def test_a_head_alone_may_be_trained():
    model = llama(vocab_size=VOCABULARY).double()
    model.requires_grad_(False).lm_head.requires_grad_(True)
    assert_same_loss_and_gradients(model, batch())


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model = peft("bone on the head").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same_loss_and_gradients(model, batch())


def test_a_compiled_model():
    model = peft("bone on the head")
    expected, wanted = (loss := plain_loss(model, **batch())).detach(), gradients(model, loss)
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        loss = completion_loss(compiled, **batch())
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradients(model, loss), wanted)


def test_autocast_is_the_models_own():
    model, inputs = adapted(base=llama(vocab_size=VOCABULARY), target_modules=["q_proj", "lm_head"]).float(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        expected, mine = plain_loss(model, **inputs), completion_loss(model, **inputs)
    assert mine.dtype == torch.float32
    torch.testing.assert_close(mine.double(), expected, rtol=1e-6, atol=0)
    wanted, found = gradients(model, expected), gradients(model, mine)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() < 0.02 * gradient.norm(), name


def test_a_scaled_loss_has_scaled_gradients_that_do_not_vanish_in_half_precision():
    """What GradScaler relies on: gradients of 2**16 times the loss, most of which float16 cannot hold unscaled."""
    model, inputs = llama(vocab_size=VOCABULARY), batch()
    wanted = gradients(model, plain_loss(model, **inputs) / 2**16)
    half = llama(vocab_size=VOCABULARY).half()
    found = gradients(half, completion_loss(half, **inputs) / 2**16 * 2**16)
    for name, gradient in wanted.items():
        assert (found[name].float() / 2**16 - gradient).norm() < 0.02 * gradient.norm(), name


def test_batches_of_a_step_are_normalized_by_all_their_tokens():
    """Splitting a batch in two (gradient accumulation) changes nothing."""
    inputs, model = batch(), llama()
    count = (inputs["labels"][:, 1:] != IGNORED).sum()
    parts = [completion_loss(model, **{k: v[i : i + 1] for k, v in inputs.items()}, supervised=count) for i in range(3)]
    torch.testing.assert_close(sum(parts), completion_loss(model, **inputs))


@pytest.mark.parametrize("kind", PEFT_KINDS)
def test_nothing_supervised_is_a_loss_of_zero_that_reaches_every_parameter(kind):
    model, inputs = peft(kind), batch()
    inputs["labels"] = torch.full_like(inputs["labels"], IGNORED)
    loss = completion_loss(model, **inputs)
    assert loss == 0
    found = gradients(model, loss)
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(gradient.any() for gradient in found.values())


@pytest.mark.parametrize("padded", [0, 5])
def test_right_padding_changes_nothing(padded):
    inputs = {name: tensor[:1] for name, tensor in batch().items()}
    fill = {"input_ids": 1, "attention_mask": 0, "labels": IGNORED}
    wide = {name: nn.functional.pad(tensor, (0, padded), value=fill[name]) for name, tensor in inputs.items()}
    torch.testing.assert_close(completion_loss(llama(), **wide), completion_loss(llama(), **inputs))


def kept_for_backward(loss, parameters):
    """Shapes of all tensors that the graph of a loss holds, parameters left out."""
    nodes, seen, kept = [loss.grad_fn], set(), set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        saved += getattr(node, "saved_tensors", ())  # of autograd functions in Python
        given = {parameter.data_ptr() for parameter in parameters}
        kept |= {tensor.shape for tensor in saved if isinstance(tensor, torch.Tensor) and tensor.data_ptr() not in given}
    return kept


@pytest.mark.parametrize("kind", ["frozen head", "bone on the head"])
def test_nothing_of_tokens_by_vocabulary_is_kept_for_backward(kind):
    vocabulary, r = 5003, 8
    targets = ["q_proj", "lm_head"] if kind == "bone on the head" else ["q_proj"]
    model, inputs = adapted(base=llama(vocab_size=vocabulary), target_modules=targets, r=r), batch()
    parameters = list(model.parameters())
    mine, plain = (kept_for_backward(loss(model, **inputs), parameters) for loss in (completion_loss, plain_loss))
    adapters_gradient = {(r, vocabulary)} if kind == "bone on the head" else set()
    assert {tuple(shape) for shape in mine if vocabulary in shape} == adapters_gradient
    assert {tuple(shape) for shape in plain if vocabulary in shape} - adapters_gradient


def test_evaluation_keeps_nothing():
    model, inputs = llama(vocab_size=VOCABULARY), batch()
    expected = plain_loss(model, **inputs)
    packed = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(packed.append, lambda tensor: tensor):
        loss = completion_loss(model, **inputs)
    assert not packed
    assert not loss.requires_grad
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    with torch.inference_mode():
        torch.testing.assert_close(completion_loss(model, **inputs), loss)


def test_an_extreme_logit_is_no_infinity():
    model, inputs = llama(vocab_size=VOCABULARY), batch()
    model.lm_head.weight.data.mul_(1000)
    assert plain_loss(model, **inputs) > 500
    assert_same_loss_and_gradients(model, inputs, rtol=1e-4, atol=1e-2)


# Models that cannot be run in chunks.


def t5():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, dropout_rate=0.0)).double().eval()


def test_an_encoder_decoder_predicts_all_its_labels():
    model, inputs = t5(), batch()
    inputs["labels"] = inputs["labels"][:, :7].contiguous()  # of another length than the input
    expected = model(**inputs).loss
    mine = completion_loss(model, **inputs)
    torch.testing.assert_close(mine, expected)
    torch.testing.assert_close(gradients(model, mine), gradients(model, expected))
    assert not check_loss(model, VOCABULARY)
    alone = [completion_loss(model, **{name: t[i : i + 1] for name, t in inputs.items()}, supervised=1) for i in range(3)]
    torch.testing.assert_close(example_losses(model, **inputs), torch.stack(alone).detach())


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids, attention_mask, use_cache):
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


def test_an_unknown_wrapper_is_called_for_its_logits():
    model = Wrapper(llama(vocab_size=VOCABULARY).double())
    assert_same_loss_and_gradients(model, batch())
    assert not check_loss(model, VOCABULARY)


def test_a_model_without_the_body_it_names():
    model = llama(vocab_size=VOCABULARY).double()
    model.base_model_prefix = "nothing"
    model.get_decoder = lambda: model
    model.get_input_embeddings = lambda: None
    assert_same_loss_and_gradients(model, batch())
    assert not check_loss(model, VOCABULARY)


class _Particular(type(llama())):
    """Refuses a last hidden state of one row where several were asked."""

    def forward(self, input_ids=None, **inputs):
        output = self.model(input_ids=input_ids, **inputs)
        return CausalLMOutput(logits=self.lm_head(output.last_hidden_state.view(*input_ids.shape, -1)))


def test_a_model_that_fails_in_chunks_makes_all_its_logits():
    model = llama(vocab_size=VOCABULARY).double()
    model.__class__ = _Particular
    modes = [module.training for module in model.modules()]
    assert not check_loss(model, VOCABULARY)
    assert [module.training for module in model.modules()] == modes
    assert_same_loss_and_gradients(model, batch())


def test_a_model_that_fails_by_itself_is_no_disagreement():
    with pytest.raises(IndexError):
        check_loss(llama(vocab_size=8), 10**6)


def test_any_number_may_be_predicted():
    """-100 too, which stands for no class; NaN stands for no number."""
    logits = torch.tensor([[1.0], [2.0], [3.0]], requires_grad=True)
    loss = label_loss(logits, torch.tensor([-100.0, math.nan, 5.0]))
    assert loss == 101**2 + 2**2
    loss.backward()
    assert logits.grad.flatten().tolist() == [202.0, 0.0, -4.0]
    model = lambda: SimpleNamespace(logits=logits)  # noqa: E731
    assert classification_loss(model, labels=torch.tensor([-100.0, math.nan, 5.0])) == loss / 2
    assert label_loss(torch.zeros(2, 4), torch.tensor([1, IGNORED])).item() == pytest.approx(math.log(4))


class _Neighbours(type(llama())):
    """Its logits depend on more than the position's own hidden state, which nothing but a check can tell."""

    def forward(self, **inputs):
        output = super().forward(**inputs)
        output.logits = output.logits + output.logits.cumsum(1)
        return output


def test_the_check_finds_a_head_that_looks_around_and_the_loss_is_right_from_then_on():
    model = llama(vocab_size=VOCABULARY).double()
    model.__class__ = _Neighbours
    assert not check_loss(model, VOCABULARY)
    assert_same_loss_and_gradients(model, batch())


def test_outputs_of_another_length_are_refused():
    model, inputs = llama(vocab_size=VOCABULARY), batch()
    inputs["labels"] = inputs["labels"][:, :7]
    with pytest.raises(InputError, match="answers"):
        completion_loss(model, **inputs)


def test_a_failing_forward_leaves_the_model_as_it_was():
    model, inputs = llama(vocab_size=VOCABULARY), batch()
    body = model.model
    with pytest.raises(IndexError):
        completion_loss(model, labels=inputs["labels"], input_ids=inputs["input_ids"] + VOCABULARY)
    assert model.model is body
    assert "forward" not in model.__dict__
