"""A model in the Hugging Face layout as a GGUF file, which llama.cpp and Ollama load; one tensor at a time is in memory."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bonetune.errors import InputError
from bonetune.formats.checkpoint import Checkpoint, local_folder
from bonetune.formats.gguf_layout import (
    NUMBERS,
    Layout,
    begin,
    check_numbers,
    declare,
    encoded,
    import_gguf,
    numbers_of,
    written_beside,
)
from bonetune.formats.gguf_vocabulary import add, vocabulary
from bonetune.models import end_tokens, load_tokenizer, skeleton

NAME = "gguf"
_FILE_TYPES = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
_STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float32"}
_ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class WrittenModel:
    """What was written.

    Args:
        tensors: names in GGUF to the number format of each.
        dtype: of the weights.
        pre_tokenizer: llama.cpp's name of how texts are cut before merging.
        notes: what llama.cpp will do differently, or what was not written as asked for.
    """

    tensors: dict[str, str]
    dtype: str
    pre_tokenizer: str
    notes: tuple[str, ...]


def write_gguf(model: str, output: str, *, dtype: str = "auto", pre_tokenizer: str | None = None) -> WrittenModel:
    """Write a model and its tokenizer as one GGUF file.

    Args:
        model: a folder, or an id on the hub, of a class of `gguf_layout.ARCHITECTURES` with safetensors weights.
        output: the file; one that is there is replaced when the new one is whole.
        dtype: of matrices: float32, float16, bfloat16 or q8_0; `auto` is the checkpoint's. Vectors are float32.
        pre_tokenizer: llama.cpp's name of how the tokenizer cuts texts; None: it is recognised.

    Raises:
        InputError: there is no such model, or llama.cpp would compute something else from it.
    """
    check_numbers(dtype, ("auto", *NUMBERS))
    import_gguf()
    folder = local_folder(model)
    bare = skeleton(str(folder))
    layout, checkpoint = Layout(bare), Checkpoint(folder)
    numbers = _stored_numbers(checkpoint) if dtype == "auto" else dtype
    notes = _check(bare, layout)
    tokenizer = load_tokenizer(str(folder))
    words = vocabulary(tokenizer, bare.config.vocab_size, _ends(bare, folder, tokenizer), pre_tokenizer)
    parameters = dict(bare.named_parameters())
    names = _names(parameters, layout)
    formats = {names[parameter]: numbers_of(tuple(tensor.shape), numbers) for parameter, tensor in parameters.items()}
    if numbers == "q8_0" and "float16" in formats.values():
        notes.append("tensors whose rows no blocks of q8_0 fill are float16")
    factors = _rope_factors(bare.config)
    with written_beside(Path(output), layout.architecture) as writer:
        _describe(writer, bare.config, folder, numbers, checkpoint)
        add(writer, words)
        if factors is not None:
            declare(writer, _ROPE_FACTORS, tuple(factors.shape), "float32")
        for parameter, tensor in parameters.items():
            declare(writer, names[parameter], tuple(tensor.shape), formats[names[parameter]])
        begin(writer)
        if factors is not None:
            writer.write_tensor_data(encoded(_ROPE_FACTORS, factors, "float32"))
        for parameter, tensor in _tensors(parameters, checkpoint, layout):
            writer.write_tensor_data(encoded(parameter, tensor, formats[names[parameter]]))
    return WrittenModel(formats, numbers, words.pre_tokenizer, (*notes, *words.notes))


def _tensors(parameters: dict[str, Any], checkpoint: Checkpoint, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    for parameter, expected in parameters.items():
        tensor = checkpoint.tensor(checkpoint.name_of(parameter))
        if tensor.shape != expected.shape:
            raise InputError(
                f"Model {checkpoint.folder} has {parameter} of shape {tuple(tensor.shape)}, and config.json says "
                f"{tuple(expected.shape)}."
            )
        yield parameter, layout.rows(parameter, tensor)


def _names(parameters: dict[str, Any], layout: Layout) -> dict[str, str]:
    names = {parameter: layout.name(parameter) for parameter in parameters}
    if without := [parameter for parameter, name in names.items() if name is None]:
        raise InputError(f"GGUF has no name for {len(without)} parameters of this model, {without[0]} for one.")
    return {parameter: str(name) for parameter, name in names.items()}


def _stored_numbers(checkpoint: Checkpoint) -> str:
    """The number format of most of a checkpoint's values."""
    sizes: dict[str, int] = {}
    for stored in checkpoint.stored.values():
        sizes[stored.dtype] = sizes.get(stored.dtype, 0) + stored.stop - stored.start
    most = max(sizes, key=lambda name: sizes[name])
    if most not in _STORED:
        raise InputError(
            f"Model {checkpoint.folder} is stored as {most}: pass --dtype, or merge into a base of 16 or 32 bits first."
        )
    return _STORED[most]


def _check(model: Any, layout: Layout) -> list[str]:
    """Raise `InputError` for what llama.cpp would compute otherwise; return what it would only for long texts."""
    config, name = model.config, layout.architecture.name
    heads, wanted = config.num_attention_heads, getattr(config, "head_dim", None)
    wrong = []
    if config.architectures and config.architectures[0] != type(model).__name__:
        wrong.append(f"its config.json says {config.architectures[0]}")
    if getattr(config, "quantization_config", None):
        wrong.append("its weights are quantized; merge into the 16-bit model")
    if config.hidden_act != "silu":
        wrong.append(f"its activation is {config.hidden_act}, not silu")
    if name == "qwen2" and wanted not in (None, config.hidden_size // heads):
        wrong.append(f"its head_dim is {wanted}, not hidden_size / num_attention_heads")
    biases = ("o_proj.bias", "gate_proj.bias", "up_proj.bias", "down_proj.bias")
    if name != "llama" and any(key.endswith(biases) for key in model.state_dict()):
        wrong.append("it has biases that this architecture has none of")
    rope = config.rope_parameters
    if rope["rope_type"] not in ("default", "linear", "llama3", "yarn") or (rope["rope_type"] == "llama3" and name != "llama"):
        wrong.append(f"its rope_type is {rope['rope_type']}")
    betas = (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1, rope.get("truncate", True))
    if rope["rope_type"] == "yarn" and betas != (32, 1, True):
        wrong.append("its yarn scaling has other settings than beta_fast=32, beta_slow=1, truncate=true")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        wrong.append("it rotates a part of each head")
    if wrong:
        raise InputError(f"This {type(model).__name__} cannot be written to GGUF: {'; '.join(wrong)}.")
    window = getattr(config, "sliding_window", None)
    if window is None or not getattr(config, "use_sliding_window", True):
        return []
    return [f"beyond {window} tokens answers differ: transformers attends to the last ones, llama.cpp to all"]


def _rope_factors(config: Any) -> Tensor | None:
    """By what llama3's scaling divides each frequency; None for other scalings, which llama.cpp knows by name."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = 2 * len(scaled)
    plain = rope["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    return (plain / scaled.double()).float()


def _ends(model: Any, folder: Path, tokenizer: Any) -> list[int]:
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder))
    return end_tokens(model, tokenizer)


def _describe(writer: Any, config: Any, folder: Path, numbers: str, checkpoint: Checkpoint) -> None:
    gguf = import_gguf()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_type("model")
    writer.add_name(folder.name)
    writer.add_file_type(int(gguf.LlamaFileType[_FILE_TYPES[numbers]]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_string("bonetune.version", version("bonetune"))
    writer.add_string("bonetune.source_fingerprint", checkpoint.fingerprint)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _describe_rope(writer, config)


def _describe_rope(writer: Any, config: Any) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kinds, rope = import_gguf().RopeScalingType, config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(kinds.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        _, attention = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
        writer.add_rope_scaling_type(kinds.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        # on top of what llama.cpp multiplies by itself
        writer.add_rope_scaling_attn_factors(attention / (0.1 * math.log(rope["factor"]) + 1))
