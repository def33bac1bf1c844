"""How llama.cpp's files lay out a model: names of tensors, the order of rows, number formats. Shared by models and adapters."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bonetune.errors import InputError
from bonetune.files import file_written_beside

NUMBERS = ("float32", "float16", "bfloat16", "q8_0")
_Q8_0_BLOCK = 32


@dataclass(frozen=True)
class Architecture:
    """What a class of transformers is in GGUF.

    Args:
        name: `general.architecture`.
        neighbours: whether the rotary embedding turns neighbouring rows of q and k, (2j, 2j + 1) of a head, where transformers
            turns row j of a head with row j + head_dim / 2.
    """

    name: str
    neighbours: bool


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama", neighbours=True),
    "MistralForCausalLM": Architecture("llama", neighbours=True),
    "Qwen2ForCausalLM": Architecture("qwen2", neighbours=False),
    "Qwen3ForCausalLM": Architecture("qwen3", neighbours=False),
}


class Layout:
    """The names and the order of rows that one model's tensors have in GGUF.

    Args:
        model: a causal language model of transformers; its weights may be on the meta device.

    Raises:
        InputError: a class of model that is not in `ARCHITECTURES`.
    """

    def __init__(self, model: Any) -> None:
        gguf = import_gguf()
        known = ARCHITECTURES.get(type(model).__name__)
        if known is None:
            raise InputError(
                f"GGUF files are written for {', '.join(ARCHITECTURES)}, not for {type(model).__name__}. For other models, use "
                "llama.cpp's convert_hf_to_gguf.py on the merged model."
            )
        self.architecture, self.config = known, model.config
        number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == known.name)
        self._names = gguf.get_tensor_name_map(number, self.config.num_hidden_layers)

    def name(self, parameter: str) -> str | None:
        """The name in GGUF of a parameter of the model: `blk.0.attn_q.weight`; None if it has none."""
        return self._names.get_name(parameter, try_suffixes=(".weight", ".bias"))

    def rows(self, parameter: str, tensor: Tensor, *, back: bool = False) -> Tensor:
        """A parameter, or what is added to it, (out, ...), with its rows in GGUF's order, or `back` in transformers'."""
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        count = heads.get(parameter.rpartition(".")[0].rpartition(".")[2])
        if not self.architecture.neighbours or count is None:
            return tensor
        return tensor.unflatten(0, (count, -1, 2) if back else (count, 2, -1)).transpose(1, 2).flatten(0, 2)


def import_gguf() -> Any:
    """The gguf package.

    Raises:
        InputError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise InputError("GGUF files need the gguf package: pip install 'bonetune[gguf]'.") from error
    return gguf


def check_numbers(dtype: str, allowed: tuple[str, ...]) -> None:
    """Raise `InputError` if a number format is none of those allowed."""
    if dtype not in allowed:
        raise InputError(f"Unknown dtype {dtype!r} for GGUF: choose one of {', '.join(allowed)}.")


def numbers_of(shape: tuple[int, ...], dtype: str) -> str:
    """The number format that a tensor is written in: vectors in float32, rows that no blocks of q8_0 fill in float16."""
    if len(shape) < 2:
        return "float32"
    return "float16" if dtype == "q8_0" and shape[-1] % _Q8_0_BLOCK else dtype


def declare(writer: Any, name: str, shape: tuple[int, ...], numbers: str) -> None:
    """Announce a tensor to a writer; its values are written later, in the order of the announcements."""
    import numpy

    gguf = import_gguf()
    kind = gguf.GGMLQuantizationType[{"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}[numbers]]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    elements = 1
    for side in shape:
        elements *= side
    writer.add_tensor_info(name, shape, numpy.dtype(numpy.float32), elements // block * size, raw_dtype=kind)


def encoded(name: str, tensor: Tensor, numbers: str) -> Any:
    """A tensor's values in a number format, as an array of NumPy for the writer.

    Raises:
        InputError: values that are not finite, or not in that format.
    """
    gguf = import_gguf()
    if not bool(torch.isfinite(tensor).all()):
        raise InputError(f"Tensor {name} has values that are not finite.")
    if numbers == "q8_0":
        return gguf.quantize(tensor.float().contiguous().numpy(), gguf.GGMLQuantizationType.Q8_0)
    cast = tensor.to(getattr(torch, numbers)).contiguous()
    if not bool(torch.isfinite(cast).all()):
        raise InputError(f"Tensor {name} has values beyond {numbers}, up to {float(tensor.abs().max()):.4g}: use bfloat16.")
    return (cast.view(torch.int16) if numbers == "bfloat16" else cast).numpy()


def values(tensor: Any) -> Tensor:
    """A tensor of a GGUF reader, in float32."""
    sides = [int(side) for side in reversed(tensor.shape)]
    return torch.from_numpy(import_gguf().dequantize(tensor.data, tensor.tensor_type).copy()).float().reshape(sides)


@contextmanager
def written_beside(path: Path, architecture: Architecture) -> Iterator[Any]:
    """Yield a GGUF writer of a file near `path`, which becomes `path` when the block ends well, and else is removed."""
    gguf = import_gguf()
    with file_written_beside(path) as beside:
        writer = gguf.GGUFWriter(beside, architecture.name)
        try:
            yield writer
        finally:
            writer.close()


def begin(writer: Any) -> None:
    """Write the header and all announcements; the tensors' values follow."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
