"""Tiny models of each class that GGUF files are written for, adapters on them, and how to read a GGUF file."""

import numpy as np
import torch
from conftest import llama
from gguf import GGUFReader, dequantize
from peft import get_peft_model
from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from bonetune import BoneConfig
from bonetune.formats import bone
from bonetune.formats.fitting import fit

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def randomized(model):
    """With biases and norms that are not all zeros and ones."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


MODELS = {
    "llama": lambda **changes: randomized(llama(**changes)),
    "llama, tied": lambda **changes: randomized(llama(tie_word_embeddings=True, **changes)),
    "llama, biases": lambda **changes: randomized(llama(attention_bias=True, mlp_bias=True, **changes)),
    "llama, wide heads": lambda **changes: randomized(llama(head_dim=16, **changes)),
    "mistral": lambda **changes: randomized(MistralForCausalLM(MistralConfig(**(SIZES | {"sliding_window": None} | changes)))),
    "qwen2": lambda **changes: randomized(Qwen2ForCausalLM(Qwen2Config(**(SIZES | changes)))),
    # transformers reads no head_dim from GGUF files, so that it has to be the default
    "qwen3": lambda **changes: randomized(Qwen3ForCausalLM(Qwen3Config(**(SIZES | {"head_dim": 128} | changes)))),
}
PERMUTED = {name: name.startswith(("llama", "mistral")) for name in MODELS}


def folder_of(path, name, tokenizer=None, **changes):
    """A tiny model's folder."""
    torch.manual_seed(0)
    MODELS[name](**changes).save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    return path


def adapter_on(folder, path, model, variant, size=1.0, **changes):
    """The folder of a random adapter on a model, its values multiplied by `size`."""
    torch.manual_seed(1)
    settings = {"r": 4, "variant": variant, "mini_r": 2, "target_modules": "all-linear", "init_weights": False}
    adapted = get_peft_model(model, BoneConfig(**(settings | changes), task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            parameter.mul_(size if "bone_block" in name else 1.0)
    adapted.peft_config["default"].base_model_name_or_path = str(folder)
    adapted.save_pretrained(path, save_embedding_layers=False)
    return path


def fitted_on(folder, path, model, variant, **changes):
    """The same, read and fitted."""
    return fit(bone.read(adapter_on(folder, path, model, variant, **changes)))


def tensors_of(file):
    """The tensors of a GGUF file in float32, by name."""
    return {
        tensor.name: torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)).reshape(
            [int(side) for side in tensor.shape[::-1]]
        )
        for tensor in GGUFReader(file).tensors
    }


def field(file, key):
    """A value of a GGUF file's metadata."""
    return GGUFReader(file).fields[key].contents()


def in_transformers_order(rows, heads):
    """Rows as GGUF has them for Llama, put back one by one: of a head, rows 2j and 2j + 1 are j and j + half."""
    size = rows.shape[0] // heads
    back = torch.empty_like(rows)
    for head in range(heads):
        for j in range(size // 2):
            back[head * size + j] = rows[head * size + 2 * j]
            back[head * size + size // 2 + j] = rows[head * size + 2 * j + 1]
    return back
