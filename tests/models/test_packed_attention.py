"""Sequences in one row get what each gets alone, and cannot tell what the others hold."""

import functools

import pytest
import torch
from adapted_models import adapted
from conftest import llama
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    FalconH1Config,
    Gemma2Config,
    GPT2Config,
    JambaConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    RwkvConfig,
)

from bonetune.data.examples import IGNORED
from bonetune.errors import InputError
from bonetune.losses import completion_loss
from bonetune.models.packed_attention import PACKED_SDPA, packed_attention, packed_mask, packed_sdpa, packing_obstacle

LENGTHS = (7, 3, 1, 9, 7)
WINDOW = 3  # shorter than the sequences
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
GPT2_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, "initializer_range": 0.2, **NO_DROPOUT}
HYBRID = {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "use_mamba_kernels": False}
LLAMA4 = {"head_dim": 8, "intermediate_size_mlp": 48, "attention_chunk_size": WINDOW, "moe_layers": []}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "mistral, short window": MistralConfig(**SIZES, sliding_window=WINDOW),
    "llama4, short chunks": Llama4TextConfig(**SIZES, **LLAMA4),
    "gpt2": GPT2Config(**GPT2_SIZES, bos_token_id=0, eos_token_id=1),
    "phi": PhiConfig(**SIZES),
    "opt": OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=16, max_position_embeddings=64, dropout=0.0),
    "gemma2": Gemma2Config(**SIZES, head_dim=8, sliding_window=WINDOW),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "mamba": MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=96, state_size=4),
    "rwkv": RwkvConfig(hidden_size=32, num_hidden_layers=2, vocab_size=96, attention_hidden_size=32),
    "bloom": BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=96),
    "falcon": FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=96),
    "jamba": JambaConfig(**SIZES, **HYBRID),
}
PLAIN = {name: value for name, value in SIZES.items() if name != "initializer_range"}
H1 = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4, "mamba_chunk_size": 8}
REMEMBERING = {
    "jamba": JambaConfig(**PLAIN, **HYBRID),
    "falcon-h1": FalconH1Config(**PLAIN, **H1),
    "lfm2": Lfm2Config(**PLAIN, layer_types=["conv", "full_attention"]),
}
# flex_attention is not among them: it has no backward on CPUs
PACKED = [
    *(
        (name, way)
        for name in ("llama", "qwen2", "mistral, short window", "gpt2", "phi")
        for way in (PACKED_SDPA, "sdpa", "eager")
    ),
    ("llama4, short chunks", PACKED_SDPA),
    ("opt", PACKED_SDPA),
    ("gemma2", "eager"),
]
TARGETS = {"gpt2": ["c_attn", "c_fc"], "opt": ["q_proj", "fc1"], "phi": ["q_proj", "fc1"], "llama4, short chunks": ["q_proj"]}


def of(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name]).eval()


def with_adapters(name):
    return adapted(base=of(name).double(), target_modules=TARGETS.get(name, ["q_proj", "up_proj"]))


def _leaking(forward, share):
    """A forward whose logits hold some of those of the token five before, of whichever sequence."""

    @functools.wraps(forward)
    def leaking(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if kwargs.get("cu_seq_lens_q") is not None:
            output.logits = output.logits + share * output.logits.roll(5, 1)
        return output

    return leaking


def sequences():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, 96, (length,), generator=generator) for length in LENGTHS]


def laid_out(rows):
    ends = torch.tensor([0, *map(len, rows)]).cumsum(0).int()
    return {
        "input_ids": torch.cat(rows)[None],
        "position_ids": torch.cat([torch.arange(len(ids)) for ids in rows])[None],
        **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), ends),
        **dict.fromkeys(("max_length_q", "max_length_k"), max(map(len, rows))),
        "use_cache": False,
    }


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("name", "implementation"), PACKED)
def test_what_one_sequence_holds_does_not_reach_the_others(name, implementation):
    model, rows = of(name), sequences()
    with packed_attention(model, implementation), torch.no_grad():
        before = model(**laid_out(rows)).logits.split(LENGTHS, 1)
        for changed in range(len(rows)):
            others = [ids if i != changed else (ids + 1) % 96 for i, ids in enumerate(rows)]
            after = model(**laid_out(others)).logits.split(LENGTHS, 1)
            assert [torch.equal(a, b) for a, b in zip(after, before, strict=True)] == [i != changed for i in range(len(rows))]


@pytest.mark.parametrize(("name", "implementation"), PACKED)
def test_packed_and_apart_are_the_same_in_values_and_gradients(name, implementation):
    model, rows = with_adapters(name), sequences()
    weights = [torch.randn(1, length, 96, dtype=torch.float64) for length in LENGTHS]
    with packed_attention(model, implementation):
        together = model(**laid_out(rows)).logits.split(LENGTHS, 1)
        found = gradients(model, sum((w * logits).sum() for w, logits in zip(weights, together, strict=True)))
    apart = [model(input_ids=ids[None], use_cache=False).logits for ids in rows]
    wanted = gradients(model, sum((w * logits).sum() for w, logits in zip(weights, apart, strict=True)))
    # transformers' eager attention and norms are float32 inside
    torch.testing.assert_close(list(together), apart, rtol=1e-4, atol=1e-5)
    assert all(gradient.norm() > 0 for gradient in wanted.values())
    for key, gradient in wanted.items():
        assert (found[key] - gradient).norm() < 1e-5 * gradient.norm(), key


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "mistral, short window", "opt"])
def test_gradient_checkpointing_attends_in_the_same_way(name, reentrant):
    model, rows = with_adapters(name).train(), sequences()
    model.enable_input_require_grads()
    with packed_attention(model):
        wanted = gradients(model, model(**laid_out(rows)).logits.square().sum())
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        found = gradients(model, model(**laid_out(rows)).logits.square().sum())
    torch.testing.assert_close(found, wanted)


def test_the_loss_of_a_packed_row_is_that_of_the_padded_batch():
    model, rows = with_adapters("llama"), sequences()
    labels = [torch.cat([torch.tensor([IGNORED]), ids[1:]]) for ids in rows]
    packed = {**laid_out(rows), "labels": torch.cat(labels)[None]}
    del packed["use_cache"]
    pad = {"batch_first": True}
    padded = {
        "input_ids": nn.utils.rnn.pad_sequence(rows, **pad),
        "attention_mask": nn.utils.rnn.pad_sequence([torch.ones_like(ids) for ids in rows], **pad),
        "labels": nn.utils.rnn.pad_sequence(labels, padding_value=IGNORED, **pad),
    }
    expected = completion_loss(model, **padded)
    with packed_attention(model):
        loss = completion_loss(model, **packed)
        found = gradients(model, loss)
    torch.testing.assert_close(loss, expected)
    wanted = gradients(model, expected)
    torch.testing.assert_close(found, wanted)


def test_autocast():
    model, rows = adapted(base=of("llama"), target_modules=["q_proj"]), sequences()
    with packed_attention(model):
        expected = model(**laid_out(rows)).logits
        with torch.autocast("cpu", torch.bfloat16):
            half = model(**laid_out(rows)).logits
    assert half.dtype == torch.bfloat16
    assert (half - expected).norm() < 0.05 * expected.norm()


# torch's own tracer instantiates autograd functions and reads .grad of what enters a frame
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning", "ignore:The .grad attribute:UserWarning")
def test_compiled_layers():
    model, rows = with_adapters("mistral, short window"), sequences()
    with packed_attention(model):
        expected = model(**laid_out(rows)).logits
        wanted = gradients(model, expected.square().sum())
        for layer in model.get_base_model().model.layers:
            layer.compile(backend="eager")
        compiled = model(**laid_out(rows)).logits
        found = gradients(model, compiled.square().sum())
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", ["llama", "mistral, short window", "llama4, short chunks", "gpt2", "opt"])
def test_every_other_call_is_transformers_sdpa(name):
    model = of(name)
    ids = torch.stack([torch.arange(2, 12), torch.arange(20, 30)])
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    calls = [{}, {"attention_mask": mask}, {"attention_mask": mask.flip(1)}]

    def answers():
        with torch.no_grad():
            logits = [model(input_ids=ids, use_cache=False, **call).logits for call in calls]
            cached = model.generate(ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        return [*logits, cached]

    expected = answers()
    with packed_attention(model) as implementation:
        assert implementation == PACKED_SDPA
        found = answers()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("window", [None, WINDOW])
def test_nothing_of_row_by_row_is_allocated(window):
    """With twice as many sequences, the largest tensor that any operation makes is twice as large, not four times."""

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
            return result

    model = of("mistral, short window" if window else "llama").train()
    found = {}
    for implementation in (PACKED_SDPA, "sdpa"):
        for number in (40, 80):
            rows = [torch.arange(2, 10)] * number
            with packed_attention(model, implementation), Largest() as largest:
                model.model(**laid_out(rows)).last_hidden_state.sum().backward()
            found[implementation, number] = largest.elements
    assert found[PACKED_SDPA, 80] == 2 * found[PACKED_SDPA, 40]
    assert found["sdpa", 80] >= (80 * 8) ** 2 > found[PACKED_SDPA, 80]


class TestObstacles:
    @pytest.mark.parametrize("name", ["llama", "qwen2", "mistral, short window", "gpt2", "phi", "opt", "gemma2", "mixtral"])
    def test_none(self, name):
        model = of(name)
        with packed_attention(model):
            assert packing_obstacle(model) is None

    @pytest.mark.parametrize(
        ("name", "why"),
        [
            ("mamba", "takes no position_ids"),
            ("rwkv", "takes no position_ids"),
            ("bloom", "takes no position_ids"),
            ("falcon", "other logits"),
            ("jamba", "go on from one sequence of a row to the next: linear_attention"),
        ],
    )
    def test_models_that_cannot(self, name, why):
        model = of(name)
        with packed_attention(model):
            assert why in packing_obstacle(model)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("config", REMEMBERING)
    def test_small_weights_hide_nothing(self, config, dtype):
        """At the usual initialization, what leaks into the neighbours' logits is less than a percent of them."""
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(REMEMBERING[config]).eval().to(dtype)
        with packed_attention(model):
            assert "go on from one sequence" in packing_obstacle(model)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("name", ["llama", "mixtral"])
    def test_a_leak_is_found_however_small(self, name, dtype, monkeypatch):
        model = of(name).to(dtype)
        monkeypatch.setattr(type(model), "forward", _leaking(type(model).forward, 3e-4 if dtype == torch.float32 else 0.03))
        with packed_attention(model):
            assert "see each other" in packing_obstacle(model)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_rounding_among_experts_is_no_leak(self, dtype):
        torch.manual_seed(1)
        sizes = SIZES | {"hidden_size": 128, "initializer_range": 0.02}
        model = AutoModelForCausalLM.from_config(MixtralConfig(**sizes, num_local_experts=8)).eval().to(dtype)
        with packed_attention(model):
            assert packing_obstacle(model) is None

    @pytest.mark.parametrize("kind", ["dynamic", "longrope"])
    def test_positions_that_depend_on_the_row(self, kind):
        factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 8}
        rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0} | (factors if kind == "longrope" else {})
        make = Phi3Config if kind == "longrope" else LlamaConfig
        model = AutoModelForCausalLM.from_config(make(**SIZES, max_position_embeddings=32, rope_parameters=rope)).eval()
        with packed_attention(model):
            assert f"has {kind} positions" in packing_obstacle(model)

    def test_a_model_whose_masks_know_nothing_of_positions(self):
        """transformers' own sdpa takes OPT's row for one sequence."""
        assert "other logits" in packing_obstacle(of("opt"))

    def test_half_precision_and_adapters(self):
        model = adapted(base=llama().bfloat16())
        with packed_attention(model):
            assert packing_obstacle(model) is None

    def test_a_classifier(self):
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(CONFIGS["llama"]).eval()
        assert "no output for each token" in packing_obstacle(model)

    def test_the_model_is_left_as_it_was(self):
        model = of("llama").train()
        model.lm_head.eval()
        state = torch.get_rng_state()
        packing_obstacle(model)
        assert model.training
        assert not model.lm_head.training
        assert torch.equal(torch.get_rng_state(), state)
        assert model.config._attn_implementation == "sdpa"


class TestWhatIsRefused:
    def test_a_model_without_the_implementation(self):
        with pytest.raises(InputError, match="cannot attend by 'packed_sdpa'"), packed_attention(of("gemma2"), PACKED_SDPA):
            pass
        with pytest.raises(InputError, match="no choice"), packed_attention(of("falcon"), "eager"):
            pass

    @pytest.mark.parametrize("unknown", ["softcap", "s_aux", "position_bias"])
    def test_what_it_does_not_compute(self, unknown):
        q = torch.randn(1, 2, 5, 4)
        with pytest.raises(InputError, match=unknown):
            packed_sdpa(nn.Identity(), q, q, q, None, cu_seq_lens_q=torch.tensor([0, 2, 5]), **{unknown: torch.ones(2)})

    def test_a_cache(self):
        q = torch.randn(1, 2, 5, 4)
        with pytest.raises(InputError, match="use_cache=False"):
            packed_sdpa(nn.Identity(), q, torch.randn(1, 2, 7, 4), q, None, cu_seq_lens_q=torch.tensor([0, 2, 5]))

    def test_the_implementation_is_set_back_after_an_error(self):
        model = of("llama")
        with pytest.raises(RuntimeError), packed_attention(model):
            raise RuntimeError
        assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("pattern", ["all", "window", "chunk"])
def test_the_mask_says_what_the_pattern_says(pattern):
    """Against a loop over all pairs of tokens."""
    rows = torch.tensor([i for i, length in enumerate(LENGTHS) for _ in range(length)])
    positions = torch.cat([torch.arange(length) for length in LENGTHS])

    def sees(batch, head, q, k):
        a, b = positions[q], positions[k]
        near = {"all": a >= b, "window": a - b < WINDOW, "chunk": a // WINDOW == b // WINDOW}[pattern]
        return (rows[q] == rows[k]) & (b <= a) & near

    n = len(rows)
    spans = packed_mask(1, n, n, mask_function=sees, allow_is_causal_skip=False)
    assert spans.shape == (1, 1, n, 2)
    for q in range(n):
        seen = [k for k in range(n) if sees(0, 0, torch.tensor(q), torch.tensor(k))]
        assert seen == list(range(int(spans[0, 0, q, 0]), q + 1))


def test_a_pattern_that_looks_ahead_keeps_its_full_mask():
    def sees(batch, head, q, k):
        return (q // 4 == k // 4).expand(torch.broadcast_shapes(q.shape, k.shape))

    assert packed_mask(1, 8, 8, mask_function=sees, allow_is_causal_skip=False).shape == (1, 1, 8, 8)
