"""GGUF files of models, read back by transformers' own reader of the format, and by the gguf package."""

import json
import math
import sys
import weakref

import numpy as np
import pytest
import torch
from conftest import llama
from formats.gguf_models import MODELS, SIZES, field, folder_of, in_transformers_order, tensors_of
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GgufConfig, GPT2Config, GPT2LMHeadModel

from bonetune.errors import InputError
from bonetune.formats.checkpoint import Checkpoint
from bonetune.formats.gguf_model import write_gguf

# transformers' tokenizers of Qwen models add a token
ROOM = {"vocab_size": 336}


LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}


def read_by_transformers(file):
    config = GgufConfig(gguf_file=file.name, dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=config, dtype=torch.float32
    ).eval()


def written(tmp_path, name, tokenizer, dtype="auto", **changes):
    folder = folder_of(tmp_path / "model", name, tokenizer, **(ROOM | changes))
    return folder, write_gguf(str(folder), str(tmp_path / "model.gguf"), dtype=dtype)


def with_config(folder, **changes):
    """The folder, its config.json changed."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.fixture
def a_llama(tmp_path, tokenizer):
    return folder_of(tmp_path / "model", "llama", tokenizer)


# its reader of Llamas has no biases; they are put into transformers' order below
@pytest.mark.parametrize("name", [name for name in MODELS if name != "llama, biases"])
def test_transformers_reads_the_same_model(tmp_path, tokenizer, name):
    folder, made = written(tmp_path, name, tokenizer)
    assert made.dtype == "float32"
    ours = AutoModelForCausalLM.from_pretrained(folder).eval()
    theirs = read_by_transformers(tmp_path / "model.gguf")
    expected, got = ours.state_dict(), theirs.state_dict()
    assert expected.keys() == got.keys()
    for parameter, tensor in expected.items():
        torch.testing.assert_close(got[parameter], tensor, atol=0, rtol=0, msg=parameter)
    ids = torch.arange(2, 26).reshape(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits)


def test_biases_of_a_llama(tmp_path, tokenizer):
    folder, _ = written(tmp_path, "llama, biases", tokenizer)
    expected, got = load_file(folder / "model.safetensors"), tensors_of(tmp_path / "model.gguf")
    for kind, name, heads in (("q", "attn_q", 4), ("k", "attn_k", 2)):
        ours = expected[f"model.layers.1.self_attn.{kind}_proj.bias"]
        assert not torch.equal(got[f"blk.1.{name}.bias"], ours)
        assert torch.equal(in_transformers_order(got[f"blk.1.{name}.bias"], heads), ours)
    assert torch.equal(got["blk.0.ffn_down.bias"], expected["model.layers.0.mlp.down_proj.bias"])
    assert torch.equal(got["blk.0.attn_output.bias"], expected["model.layers.0.self_attn.o_proj.bias"])


def test_a_tied_head_is_written_once(tmp_path, tokenizer):
    written(tmp_path, "llama, tied", tokenizer)
    assert "output.weight" not in tensors_of(tmp_path / "model.gguf")


@pytest.mark.parametrize(("dtype", "error"), [("float16", 2**-11), ("bfloat16", 2**-8), ("q8_0", 1 / 254 + 2**-10)])
def test_number_formats(tmp_path, tokenizer, dtype, error):
    sizes = {"hidden_size": 64, "intermediate_size": 48, "initializer_range": 0.02}
    folder, made = written(tmp_path, "llama", tokenizer, dtype, **sizes)
    write_gguf(str(folder), str(tmp_path / "exact.gguf"), dtype="float32")
    exact, got = tensors_of(tmp_path / "exact.gguf"), tensors_of(tmp_path / "model.gguf")
    for name, tensor in exact.items():
        if tensor.dim() == 1:
            assert torch.equal(got[name], tensor)
            continue
        blocks = tensor.reshape(-1, 16)
        scale = blocks.abs() if dtype != "q8_0" else tensor.abs().max()
        assert ((got[name].reshape(-1, 16) - blocks).abs() <= error * scale + 1e-7).all()
        assert not torch.equal(got[name], tensor)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    expected = {"float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}[dtype]
    assert kinds["blk.0.attn_q.weight"] == expected
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    # rows of 48 are not filled by blocks of 32
    assert kinds["blk.0.ffn_down.weight"] == ("F16" if dtype == "q8_0" else expected)
    assert bool(made.notes) == (dtype == "q8_0")
    assert made.tensors.keys() == got.keys()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_auto_is_the_checkpoints_own_and_exact(tmp_path, a_llama, dtype):
    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in load_file(a_llama / "model.safetensors").items()}
    save_file(tensors, a_llama / "model.safetensors", metadata={"format": "pt"})
    assert write_gguf(str(a_llama), str(tmp_path / "model.gguf")).dtype == dtype
    got = tensors_of(tmp_path / "model.gguf")
    assert torch.equal(got["blk.1.ffn_up.weight"], tensors["model.layers.1.mlp.up_proj.weight"].float())


def test_sizes_and_origin(tmp_path, a_llama):
    write_gguf(str(a_llama), str(tmp_path / "model.gguf"))
    config = llama().config
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "model",
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.rope.dimension_count": config.head_dim,
        "llama.vocab_size": config.vocab_size,
        "bonetune.source_fingerprint": Checkpoint(a_llama).fingerprint,
    }
    assert {key: field(tmp_path / "model.gguf", key) for key in expected} == expected
    assert field(tmp_path / "model.gguf", "llama.rope.freq_base") == pytest.approx(config.rope_parameters["rope_theta"])
    assert field(tmp_path / "model.gguf", "llama.attention.layer_norm_rms_epsilon") == pytest.approx(config.rms_norm_eps)


def test_llama_3_scales_frequencies(tmp_path, tokenizer):
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    rope = {"rope_type": "llama3", "rope_theta": 500.0, **scaling}
    written(tmp_path, "llama", tokenizer, head_dim=16, rope_parameters=rope)
    expected = []
    for j in range(8):
        wavelength = 2 * math.pi * 500.0 ** (2 * j / 16)
        if wavelength < 32 / 4:
            expected.append(1.0)
        elif wavelength > 32:
            expected.append(8.0)
        else:
            smooth = (32 / wavelength - 1) / (4 - 1)
            expected.append(1 / ((1 - smooth) / 8 + smooth))
    assert len(set(expected)) >= 3
    assert {1.0, 8.0} < set(expected)
    got = tensors_of(tmp_path / "model.gguf")["rope_freqs.weight"]
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "linear", "factor": 2.0}, {"type": "linear", "factor": 2.0}),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
            {"type": "yarn", "factor": 4.0, "original_context_length": 32, "attn_factor": 1.0},
        ),
    ],
)
def test_other_scalings_are_named(tmp_path, tokenizer, rope, expected):
    written(tmp_path, "qwen2", tokenizer, rope_parameters={"rope_theta": 1000.0, **rope})
    assert {key: field(tmp_path / "model.gguf", f"qwen2.rope.scaling.{key}") for key in expected} == expected
    assert field(tmp_path / "model.gguf", "qwen2.rope.freq_base") == 1000.0


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama, tied", {"architectures": ["LlamaForSequenceClassification"]}, "says LlamaForSequenceClassification"),
        ("llama", {"hidden_act": "gelu"}, "its activation is gelu, not silu"),
        ("qwen2", {"head_dim": 16}, "its head_dim is 16"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope_type is dynamic"),
        ("llama", {"rope_parameters": YARN | {"beta_fast": 16}}, "other settings than beta_fast=32"),
        ("llama", {"rope_parameters": YARN | {"truncate": False}}, "other settings than beta_fast=32"),
        ("qwen2", {"rope_parameters": YARN | LLAMA3}, "rope_type is llama3"),
        ("llama", {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "weights are quantized"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(tmp_path, tokenizer, name, changes, message):
    folder = with_config(folder_of(tmp_path / "model", name, tokenizer, **ROOM), **changes)
    with pytest.raises(InputError, match=message):
        write_gguf(str(folder), str(tmp_path / "model.gguf"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_sliding_windows_are_mentioned(tmp_path, tokenizer):
    _, made = written(tmp_path, "mistral", tokenizer, sliding_window=64)
    assert made.notes == ("beyond 64 tokens answers differ: transformers attends to the last ones, llama.cpp to all",)


def test_other_architectures_are_refused_by_name(tmp_path, tokenizer):
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=320, n_positions=16))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match=r"LlamaForCausalLM, .* not for GPT2LMHeadModel"):
        write_gguf(str(tmp_path / "model"), str(tmp_path / "model.gguf"))


def test_shapes_that_are_not_the_configurations_are_refused(tmp_path, a_llama):
    with_config(a_llama, intermediate_size=SIZES["intermediate_size"] + 1)
    with pytest.raises(InputError, match=r"has model\.layers\.0\.mlp\.gate_proj\.weight of shape \(48, 32\), .* \(49, 32\)"):
        write_gguf(str(a_llama), str(tmp_path / "model.gguf"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_nothing_is_half_written(tmp_path, a_llama):
    (tmp_path / "model.gguf").write_text("what was there")
    tensors = load_file(a_llama / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, a_llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.norm\.weight has values that are not finite"):
        write_gguf(str(a_llama), str(tmp_path / "model.gguf"))
    tensors["model.norm.weight"][3] = 0.0
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(tensors, a_llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="beyond float16"):
        write_gguf(str(a_llama), str(tmp_path / "model.gguf"), dtype="float16")
    assert (tmp_path / "model.gguf").read_text() == "what was there"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.gguf"]


def test_one_tensor_at_a_time_is_read(tmp_path, a_llama, monkeypatch):
    read, alive = Checkpoint.tensor, []

    def watched(self, name):
        assert sum(tensor() is not None for tensor in alive) <= 1, "the one before is still in memory"
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(Checkpoint, "tensor", watched)
    write_gguf(str(a_llama), str(tmp_path / "model.gguf"))
    assert len(alive) == len(Checkpoint(a_llama).stored)


def test_shards_are_read_like_one_file(tmp_path, a_llama, tokenizer):
    write_gguf(str(a_llama), str(tmp_path / "one.gguf"))
    AutoModelForCausalLM.from_pretrained(a_llama).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path / "sharded")
    assert len(Checkpoint(tmp_path / "sharded").files) > 2
    write_gguf(str(tmp_path / "sharded"), str(tmp_path / "many.gguf"))
    one, many = tensors_of(tmp_path / "one.gguf"), tensors_of(tmp_path / "many.gguf")
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_unknown_numbers_are_refused(tmp_path, a_llama):
    with pytest.raises(InputError, match="Unknown dtype 'q4_k' for GGUF: choose one of auto, float32, float16, bfloat16, q8_0"):
        write_gguf(str(a_llama), str(tmp_path / "model.gguf"), dtype="q4_k")


def test_without_the_gguf_package(tmp_path, a_llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"pip install 'bonetune\[gguf\]'"):
        write_gguf(str(a_llama), str(tmp_path / "model.gguf"))
