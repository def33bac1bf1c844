"""llama.cpp itself: it loads what is written here, cuts texts into the same tokens, and answers as transformers does.

It is built from the package llama-cpp-python in an environment of its own, which takes some five minutes;
BONETUNE_LLAMA_CPP_PYTHON names a Python that has it already.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from formats.gguf_models import MODELS, adapter_on, fitted_on, folder_of
from formats.gguf_tokenizers import BYTE_LEVEL, SIZE, TEXTS, byte_level, sentencepiece
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from bonetune.formats import bone, fit, gguf_lora
from bonetune.formats.gguf_layout import ARCHITECTURES
from bonetune.formats.gguf_model import write_gguf
from bonetune.formats.gguf_reading import read_factors
from bonetune.models import smollm2
from bonetune.spec import VARIANTS

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("llama_cpp_answers.py")
# Largest difference of logits, of which SmolLM2's reach 40 and a tiny model's 5; float32 on both sides.
CLOSE, CLOSE_TINY = 2e-3, 1e-4
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n",
    "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n",
]
NEW_TOKENS = 16
TINY_PROMPTS = [list(range(2, 40)), [5, 5, 9, 300, 7]]
FEW_LAYERS = {"layers_to_transform": [0, 7, 14, 29], "target_modules": ["q_proj", "k_proj", "o_proj", "down_proj"]}


@pytest.fixture(scope="session")
def engine(tmp_path_factory):
    """(model, adapter, texts, prompts, new tokens) to what llama.cpp makes of them."""
    python = os.environ.get("BONETUNE_LLAMA_CPP_PYTHON")
    if python is None:
        venv = tmp_path_factory.mktemp("llama") / "venv"
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        python = venv / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "llama-cpp-python", "numpy"], check=True)
    folder = tmp_path_factory.mktemp("jobs")

    def ask(model, lora=None, texts=(), prompts=(), new_tokens=0):
        job = {"model": str(model), "lora": lora and str(lora), "texts": texts, "prompts": prompts, "new_tokens": new_tokens}
        (folder / "job.json").write_text(json.dumps(job))
        done = subprocess.run([python, SCRIPT, folder / "job.json", folder / "result.npz"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return dict(np.load(folder / "result.npz"))

    return ask


@torch.no_grad()
def answers(model, prompts, new_tokens=0):
    """What transformers says, under the same names."""
    found = {}
    for i, prompt in enumerate(prompts):
        found[f"logits_{i}"] = model(torch.tensor([prompt])).logits[0].float().numpy()
        ids = list(prompt)
        for _ in range(new_tokens):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        found[f"greedy_{i}"] = np.array(ids[len(prompt) :])
    return found


def difference(got, expected):
    return max(float(np.abs(got[name] - expected[name]).max()) for name in expected if name.startswith("logits"))


def assert_says_the_same(got, expected, close):
    assert difference(got, expected) < close
    for name in expected:
        if name.startswith("greedy"):
            assert got[name].tolist() == expected[name].tolist()


@pytest.fixture(scope="module")
def smol(tmp_path_factory):
    """SmolLM2: its folder, and its GGUF file in float32."""
    folder, file = Path(smollm2()), tmp_path_factory.mktemp("smol") / "base.gguf"
    write_gguf(str(folder), str(file), dtype="float32")
    return folder, file


@pytest.fixture(scope="module")
def prompts(smol):
    tokenizer = AutoTokenizer.from_pretrained(smol[0])
    return [tokenizer(text).input_ids for text in PROMPTS]


def smol_adapter(smol, path, variant, **changes):
    """The folder of an adapter on SmolLM2 that changes what it says, and the adapted model in float32."""
    model = AutoModelForCausalLM.from_pretrained(smol[0], dtype=torch.float32)
    adapter_on(smol[0], path, model, variant, **({"r": 16} | changes))
    state = bone.read(path)
    state = replace(state, tensors={name: tensor * SIZE_OF[variant] / tensor.std() for name, tensor in state.tensors.items()})
    bone.write(state, path)
    base = AutoModelForCausalLM.from_pretrained(smol[0], dtype=torch.float32)
    return PeftModel.from_pretrained(base, str(path)).eval()


SIZE_OF = {"bone": 0.01, "bat": 0.03}


def test_the_base_model_says_the_same(engine, smol, prompts):
    expected = answers(AutoModelForCausalLM.from_pretrained(smol[0], dtype=torch.float32).eval(), prompts, NEW_TOKENS)
    assert_says_the_same(engine(smol[1], prompts=prompts, new_tokens=NEW_TOKENS), expected, CLOSE)


def test_bone_as_an_adapter(engine, smol, prompts, tmp_path):
    model = smol_adapter(smol, tmp_path / "adapter", "bone", target_modules="all-linear")
    gguf_lora.write(fit(bone.read(tmp_path / "adapter")), tmp_path / "adapter.gguf")
    expected = answers(model, prompts, NEW_TOKENS)
    got = engine(smol[1], tmp_path / "adapter.gguf", prompts=prompts, new_tokens=NEW_TOKENS)
    assert_says_the_same(got, expected, CLOSE)
    assert difference(engine(smol[1], prompts=prompts), expected) > 1, "the adapter does nothing"


def test_bat_as_an_adapter_of_full_and_of_lower_rank(engine, smol, prompts, tmp_path):
    model = smol_adapter(smol, tmp_path / "adapter", "bat", **FEW_LAYERS)
    fitted, expected = fit(bone.read(tmp_path / "adapter")), answers(model, prompts, NEW_TOKENS)
    file = tmp_path / "adapter.gguf"
    exact = gguf_lora.write(fitted, file, rank=576)
    assert max(factors.error for factors in exact.values()) < 1e-5
    assert_says_the_same(engine(smol[1], file, prompts=prompts, new_tokens=NEW_TOKENS), expected, CLOSE)

    cut = gguf_lora.write(fitted, file, rank=64)
    got, written = engine(smol[1], file, prompts=prompts), read_factors(file, fitted)
    truncated = AutoModelForCausalLM.from_pretrained(smol[0], dtype=torch.float32).eval()
    for layer, factors in written.items():
        delta = fitted.delta(layer).double()
        product = factors.B.double() @ factors.A.double()
        assert cut[layer].error == pytest.approx(float((delta - product).norm() / delta.norm()), rel=1e-4)
        truncated.get_submodule(layer).weight.data += product.float()
    assert difference(got, answers(truncated, prompts)) < CLOSE
    assert difference(got, expected) > 10 * CLOSE, "the ranks that were cut do nothing"


def test_a_merged_model(engine, smol, prompts, tmp_path):
    model = smol_adapter(smol, tmp_path / "adapter", "bat", **FEW_LAYERS)
    expected = answers(model, prompts, NEW_TOKENS)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(smol[0]).save_pretrained(tmp_path / "merged")
    assert write_gguf(str(tmp_path / "merged"), str(tmp_path / "merged.gguf")).dtype == "float32"
    got = engine(tmp_path / "merged.gguf", prompts=prompts, new_tokens=NEW_TOKENS)
    assert_says_the_same(got, expected, CLOSE)


def test_rows_in_the_wrong_order_are_seen(engine, smol, prompts, tmp_path, monkeypatch):
    model = smol_adapter(smol, tmp_path / "adapter", "bone", target_modules=["q_proj", "k_proj"])
    expected = answers(model, prompts)
    llama = ARCHITECTURES["LlamaForCausalLM"]
    monkeypatch.setitem(ARCHITECTURES, "LlamaForCausalLM", replace(llama, neighbours=False))
    gguf_lora.write(fit(bone.read(tmp_path / "adapter")), tmp_path / "adapter.gguf")
    assert difference(engine(smol[1], tmp_path / "adapter.gguf", prompts=prompts), expected) > 100 * CLOSE


def test_texts_become_the_same_tokens(engine, smol):
    tokenizer = AutoTokenizer.from_pretrained(smol[0])
    got = engine(smol[1], texts=TEXTS)
    assert [got[f"tokens_{i}"].tolist() for i in range(len(TEXTS))] == [tokenizer(text).input_ids for text in TEXTS]


TOKENIZERS = {name: lambda name=name: byte_level(name, bos=name in ("llama-bpe", "tekken")) for name in BYTE_LEVEL}
TOKENIZERS |= {
    "sentencepiece": sentencepiece,
    "sentencepiece, no space before texts": lambda: sentencepiece(prefix=False),
    "sentencepiece, spaces by a pre-tokenizer": lambda: sentencepiece(scheme="first"),
}
# What the notes of `write_gguf` say.
DIFFERENT = {
    "qwen2": lambda text: "\u0301" in text,
    "tekken": lambda text: not text.isascii(),
    "sentencepiece, spaces by a pre-tokenizer": lambda text: text.startswith(" ") or "<|im" in text,
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_texts_become_the_same_tokens_with_every_kind_of_tokenizer(engine, tmp_path, kind):
    tokenizer = TOKENIZERS[kind]()
    folder_of(tmp_path / "model", "llama", tokenizer, vocab_size=SIZE)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    written = write_gguf(str(tmp_path / "model"), str(tmp_path / "model.gguf"))
    got = engine(tmp_path / "model.gguf", texts=TEXTS)
    different = [i for i, text in enumerate(TEXTS) if got[f"tokens_{i}"].tolist() != tokenizer(text).input_ids]
    allowed = DIFFERENT.get(kind, lambda text: False)
    assert [TEXTS[i] for i in different if not allowed(TEXTS[i])] == []
    assert bool(written.notes) == (kind in DIFFERENT)


ROPES = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn, attention_factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 1.5,
    },
}


# llama3's scaling of a Qwen is refused
@pytest.mark.parametrize(
    ("name", "rope"), [(name, rope) for name in MODELS for rope in ROPES if rope != "llama3" or not name.startswith("qwen")]
)
def test_every_kind_of_model(engine, tmp_path, name, rope):
    changes = {"rope_parameters": {"rope_theta": 100.0, **ROPES[rope]}} if ROPES[rope] else {}
    folder = folder_of(tmp_path / "model", name, byte_level("gpt-2"), vocab_size=SIZE, **changes)
    write_gguf(str(folder), str(tmp_path / "model.gguf"))
    expected = answers(AutoModelForCausalLM.from_pretrained(folder).eval(), TINY_PROMPTS)
    assert difference(engine(tmp_path / "model.gguf", prompts=TINY_PROMPTS), expected) < CLOSE_TINY


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_every_variant_as_an_adapter(engine, tmp_path, name, variant):
    folder = folder_of(tmp_path / "model", name, byte_level("gpt-2"), vocab_size=SIZE)
    write_gguf(str(folder), str(tmp_path / "model.gguf"))
    ranks = {"rank_pattern": {"q_proj": 8, "down_proj": 2}}
    fitted = fitted_on(folder, tmp_path / "adapter", MODELS[name](vocab_size=SIZE), variant, size=0.3, **ranks)
    gguf_lora.write(fitted, tmp_path / "adapter.gguf", rank=None if variant in ("bone", "mini") else 512)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(tmp_path / "adapter")).eval()
    expected = answers(model, TINY_PROMPTS)
    assert difference(engine(tmp_path / "model.gguf", tmp_path / "adapter.gguf", prompts=TINY_PROMPTS), expected) < CLOSE_TINY
    assert difference(engine(tmp_path / "model.gguf", prompts=TINY_PROMPTS), expected) > 100 * CLOSE_TINY


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
def test_other_numbers(engine, tmp_path, dtype):
    """Coarser files answer like the model rounded in the same way, and not like another."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "initializer_range": 0.05}
    folder = folder_of(tmp_path / "model", "llama", byte_level("gpt-2"), vocab_size=SIZE, **sizes)
    write_gguf(str(folder), str(tmp_path / "model.gguf"), dtype=dtype)
    expected = answers(AutoModelForCausalLM.from_pretrained(folder).eval(), TINY_PROMPTS)
    spread = max(float(logits.std()) for name, logits in expected.items() if name.startswith("logits"))
    assert difference(engine(tmp_path / "model.gguf", prompts=TINY_PROMPTS), expected) < 0.1 * spread
