"""LoRA-GGUF: what llama.cpp's `--lora` and an Ollama `ADAPTER` load onto the GGUF file of the base model.

Each adapted weight has the factors `<name>.lora_a` (rank, in) and `<name>.lora_b` (out, rank), and llama.cpp adds
`alpha / rank * B @ A`. alpha is one number for the whole file and rank is each tensor's own: where ranks differ, the rest of
the factor goes into B.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bonetune.errors import InputError
from bonetune.formats.fitting import Fitted
from bonetune.formats.gguf_layout import Layout, begin, check_numbers, declare, encoded, written_beside
from bonetune.formats.lora import Factors, factors
from bonetune.formats.state import rank_settings
from bonetune.tuner import BoneLinear

NAME = "gguf-lora"
NUMBERS = ("float32", "float16")


def write(fitted: Fitted, path: Path, rank: int | None = None, dtype: str = "float32") -> dict[str, Factors]:
    """Write an adapter as a LoRA-GGUF file.

    Args:
        fitted: the adapter on its base model.
        path: the file; one that is there is replaced when the new one is whole.
        rank: as for `lora.factors`.
        dtype: of the factors: float32 or float16.

    Returns:
        What was written for each layer, without its tensors; the errors are of the factors before they were rounded to `dtype`.

    Raises:
        InputError: an architecture that is not known here, layers or tensors that the format has no place for.
    """
    check_numbers(dtype, NUMBERS)
    layout = Layout(fitted.model)
    names = _names(fitted, layout)
    found = {layer: factors(fitted, layer, rank) for layer in names}
    alpha, _ = rank_settings({layer: factor.rank for layer, factor in found.items()})
    with written_beside(path, layout.architecture) as writer:
        _describe(writer, fitted, alpha)
        for layer, name in names.items():
            declare(writer, f"{name}.lora_a", tuple(found[layer].A.shape), dtype)
            declare(writer, f"{name}.lora_b", tuple(found[layer].B.shape), dtype)
        begin(writer)
        for layer, name in names.items():
            scale = found[layer].rank / alpha
            b = layout.rows(fitted.parameter(layer), found[layer].B.float() * scale)
            writer.write_tensor_data(encoded(f"{name}.lora_a", found[layer].A.float(), dtype))
            writer.write_tensor_data(encoded(f"{name}.lora_b", b, dtype))
    return {layer: factor.without_tensors() for layer, factor in found.items()}


def _names(fitted: Fitted, layout: Layout) -> dict[str, str]:
    """The adapted weights' names in GGUF, by layer. Raises `InputError` for all that has none."""
    if fitted.state.whole:
        raise InputError(
            f"LoRA-GGUF has no place for parameters that are trained whole: {', '.join(sorted(fitted.state.whole))}. Merge the "
            "adapter and convert the merged model to gguf."
        )
    names, without = {}, []
    head_is_tied = bool(getattr(layout.config, "tie_word_embeddings", False))
    for layer, bone in fitted.layers.items():
        name = layout.name(fitted.parameter(layer))
        if name is None or not isinstance(bone, BoneLinear) or (name == "output.weight" and head_is_tied):
            without.append(layer)
        else:
            names[layer] = name
    if without:
        raise InputError(
            f"LoRA-GGUF has no place for adapters on {', '.join(without)}: it has one for Linear layers, and for a head that "
            "is not tied to the embeddings. Merge the adapter and convert the merged model to gguf."
        )
    return names


def _describe(writer: Any, fitted: Fitted, alpha: int) -> None:
    config, source = fitted.state.config, fitted.state.source
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(alpha))
    writer.add_name(Path(source.path).name)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, Path(fitted.base).name)
    writer.add_string("bonetune.version", version("bonetune"))
    writer.add_string("bonetune.variant", str(config.variant))
    writer.add_uint32("bonetune.r", config.r)
    writer.add_string("bonetune.source_format", source.format)
    writer.add_string("bonetune.source_sha256", json.dumps(dict(source.files), sort_keys=True))
    if source.base_fingerprint:
        writer.add_string("bonetune.base_fingerprint", source.base_fingerprint)
