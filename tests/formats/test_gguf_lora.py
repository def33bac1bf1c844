"""LoRA-GGUF files, read back by the gguf package and put into transformers' order row by row."""

import sys

import numpy as np
import pytest
import torch
from conftest import llama
from formats.gguf_models import MODELS, PERMUTED, field, fitted_on, folder_of, in_transformers_order, tensors_of
from transformers import GPT2Config, GPT2LMHeadModel

from bonetune.errors import InputError
from bonetune.formats.gguf_lora import write
from bonetune.formats.gguf_reading import read_factors
from bonetune.spec import VARIANTS

HEADS = {"attn_q": 4, "attn_k": 2}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def updates(file, permuted=True):
    """What llama.cpp adds to each weight, in transformers' order, by the layer's name in transformers."""
    tensors, alpha = tensors_of(file), field(file, "adapter.lora.alpha")
    found = {}
    for name in {name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")}:
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        delta = alpha / b.shape[1] * (b.double() @ a.double())
        _, number, kind, _ = name.split(".")
        if permuted and kind in HEADS:
            delta = in_transformers_order(delta, HEADS[kind])
        layer = next(layer for layer, ours in NAMES.items() if ours == kind)
        found[f"model.layers.{number}.{layer}"] = delta
    return found


def assert_is_the_update(fitted, file, permuted=True, **tolerances):
    found = updates(file, permuted)
    assert found.keys() == fitted.layers.keys()
    for layer, delta in found.items():
        torch.testing.assert_close(delta, fitted.delta(layer).double(), **tolerances)


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("llama"), "llama")


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_file_adds_the_update(llama_folder, tmp_path, variant):
    fitted = fitted_on(llama_folder, tmp_path / "adapter", MODELS["llama"](), variant)
    whole = 48 if fitted.state.config.variant.startswith("bat") else None  # no weight has a higher rank
    written = write(fitted, tmp_path / "adapter.gguf", rank=whole)
    assert_is_the_update(fitted, tmp_path / "adapter.gguf", atol=1e-6, rtol=1e-5)
    assert written.keys() == fitted.layers.keys()
    assert max(factors.error for factors in written.values()) < 1e-6
    if whole is None:
        assert {(factors.rank, factors.error) for factors in written.values()} == {(4, 0.0)}


@pytest.mark.parametrize("name", MODELS)
def test_the_order_of_rows_is_the_architectures(tmp_path, name):
    folder = folder_of(tmp_path / "model", name)
    fitted = fitted_on(folder, tmp_path / "adapter", MODELS[name](), "bone", target_modules=["q_proj", "k_proj", "v_proj"])
    write(fitted, tmp_path / "adapter.gguf")
    assert_is_the_update(fitted, tmp_path / "adapter.gguf", PERMUTED[name], atol=0, rtol=0)


def test_a_permutation_that_is_left_out_is_seen(llama_folder, tmp_path):
    fitted = fitted_on(llama_folder, tmp_path / "adapter", MODELS["llama"](), "bone")
    write(fitted, tmp_path / "adapter.gguf")
    with pytest.raises(AssertionError):
        assert_is_the_update(fitted, tmp_path / "adapter.gguf", permuted=False)


def test_layers_of_different_ranks(llama_folder, tmp_path):
    ranks = {"q_proj": 2, "down_proj": 6, "o_proj": 5}
    fitted = fitted_on(llama_folder, tmp_path / "adapter", MODELS["llama"](), "bone", rank_pattern=ranks)
    written = write(fitted, tmp_path / "adapter.gguf")
    assert_is_the_update(fitted, tmp_path / "adapter.gguf", atol=0, rtol=1e-6)
    assert {factors.rank for factors in written.values()} == {2, 4, 5, 6}
    assert field(tmp_path / "adapter.gguf", "adapter.lora.alpha") == 4


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_truncated_updates_error_is_that_of_its_singular_values(llama_folder, tmp_path, rank):
    fitted = fitted_on(llama_folder, tmp_path / "adapter", MODELS["llama"](), "bat")
    written = write(fitted, tmp_path / "adapter.gguf", rank=rank)
    found = updates(tmp_path / "adapter.gguf")
    for layer, factors in written.items():
        exact = fitted.delta(layer).double()
        values = np.linalg.svd(exact.numpy(), compute_uv=False)
        best = np.sqrt((values[rank:] ** 2).sum() / (values**2).sum())
        measured = float((exact - found[layer]).norm() / exact.norm())
        assert factors.error == pytest.approx(best, rel=1e-5)
        assert measured == pytest.approx(best, rel=1e-5)


def test_float16_is_rounded_and_half_as_large(llama_folder, tmp_path):
    fitted = fitted_on(llama_folder, tmp_path / "adapter", MODELS["llama"](), "bone")
    write(fitted, tmp_path / "half.gguf", dtype="float16")
    write(fitted, tmp_path / "exact.gguf")
    assert_is_the_update(fitted, tmp_path / "half.gguf", atol=1e-6, rtol=2**-11)
    with pytest.raises(AssertionError):
        assert_is_the_update(fitted, tmp_path / "half.gguf", atol=0, rtol=0)
    assert (tmp_path / "half.gguf").stat().st_size < 0.7 * (tmp_path / "exact.gguf").stat().st_size


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_what_was_written_is_read_back(tmp_path, name):
    folder, ranks = folder_of(tmp_path / "model", name), {"q_proj": 2, "down_proj": 6}
    fitted = fitted_on(folder, tmp_path / "adapter", MODELS[name](), "bone", rank_pattern=ranks)
    write(fitted, tmp_path / "adapter.gguf")
    found = read_factors(tmp_path / "adapter.gguf", fitted)
    assert found.keys() == fitted.layers.keys()
    for layer, factors in found.items():
        torch.testing.assert_close(factors.B @ factors.A, fitted.delta(layer), atol=0, rtol=1e-6)


def test_what_the_file_says_of_itself(llama_folder, tmp_path):
    fitted = fitted_on(llama_folder, tmp_path / "adapter", MODELS["llama"](), "bone")
    write(fitted, tmp_path / "adapter.gguf")
    keys = ("general.architecture", "general.type", "adapter.type", "general.base_model.0.name", "bonetune.variant")
    assert [field(tmp_path / "adapter.gguf", key) for key in keys] == ["llama", "adapter", "lora", llama_folder.name, "bone"]
    assert all(
        digest in field(tmp_path / "adapter.gguf", "bonetune.source_sha256") for digest in fitted.state.source.files.values()
    )


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_a_head_of_its_own_is_adapted_and_a_tied_one_refused(tmp_path):
    for name, refused in (("llama", False), ("llama, tied", True)):
        folder = folder_of(tmp_path / name, name)
        fitted = fitted_on(folder, tmp_path / f"{name}-adapter", MODELS[name](), "bone", target_modules=["lm_head", "v_proj"])
        if refused:
            with pytest.raises(InputError, match=r"no place for adapters on lm_head: .* not tied"):
                write(fitted, tmp_path / "adapter.gguf")
        else:
            write(fitted, tmp_path / "untied.gguf")
            tensors = tensors_of(tmp_path / "untied.gguf")
            delta = tensors["output.weight.lora_b"] @ tensors["output.weight.lora_a"]
            torch.testing.assert_close(delta, fitted.delta("lm_head"), atol=0, rtol=0)


def test_embeddings_are_refused(llama_folder, tmp_path):
    target = ["embed_tokens", "v_proj"]
    fitted = fitted_on(llama_folder, tmp_path / "adapter", MODELS["llama"](), "bone", target_modules=target)
    with pytest.raises(InputError, match=r"no place for adapters on model\.embed_tokens: .* Merge"):
        write(fitted, tmp_path / "adapter.gguf")
    assert not (tmp_path / "adapter.gguf").exists()


def test_parameters_trained_whole_are_refused(llama_folder, tmp_path):
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}
    fitted = fitted_on(llama_folder, tmp_path / "adapter", MODELS["llama"](), "bone", **settings)
    with pytest.raises(InputError, match=r"trained whole: .*, model\.norm\.weight\. Merge"):
        write(fitted, tmp_path / "adapter.gguf")


def test_other_architectures_are_refused_by_name(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16))
    model.save_pretrained(tmp_path / "model")
    fitted = fitted_on(tmp_path / "model", tmp_path / "adapter", model, "bone", target_modules=["c_attn"])
    with pytest.raises(InputError, match=r"LlamaForCausalLM, .* not for GPT2LMHeadModel"):
        write(fitted, tmp_path / "adapter.gguf")


def test_unknown_numbers_are_refused(llama_folder, tmp_path):
    fitted = fitted_on(llama_folder, tmp_path / "adapter", MODELS["llama"](), "bone")
    with pytest.raises(InputError, match="Unknown dtype 'q4_0' for GGUF: choose one of float32, float16"):
        write(fitted, tmp_path / "adapter.gguf", dtype="q4_0")


def test_nothing_is_half_written(llama_folder, tmp_path):
    fitted = fitted_on(llama_folder, tmp_path / "adapter", MODELS["llama"](), "bone")
    (tmp_path / "adapter.gguf").write_text("what was there")
    fitted.state.tensors["model.layers.1.mlp.down_proj"].fill_(1e6)
    with pytest.raises(InputError, match=r"blk\.1\.ffn_down\.weight\.lora_b has values beyond float16, up to 1e\+06"):
        write(fitted, tmp_path / "adapter.gguf", dtype="float16")
    assert (tmp_path / "adapter.gguf").read_text() == "what was there"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "adapter.gguf"]


def test_without_the_gguf_package(llama_folder, tmp_path, monkeypatch):
    fitted = fitted_on(llama_folder, tmp_path / "adapter", llama(), "bone")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"pip install 'bonetune\[gguf\]'"):
        write(fitted, tmp_path / "adapter.gguf")
