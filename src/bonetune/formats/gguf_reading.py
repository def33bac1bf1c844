"""GGUF files that were written here, read back in transformers' layout, for their certificates."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from bonetune.errors import AdapterFileError
from bonetune.formats.fitting import Fitted
from bonetune.formats.gguf_layout import Layout, import_gguf, values
from bonetune.formats.lora import Factors


def read_factors(path: Path, fitted: Fitted) -> dict[str, Factors]:
    """The factors of a LoRA-GGUF file by the layer's name, float32, alpha / rank multiplied into B.

    Args:
        path: the file.
        fitted: the adapter that it is of, on its base model.

    Raises:
        AdapterFileError: a layer's factors are not in it.
    """
    reader: Any = import_gguf().GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    layout = Layout(fitted.model)
    found = {}
    for layer in fitted:
        parameter = fitted.parameter(layer)
        name = layout.name(parameter)
        if not {f"{name}.lora_a", f"{name}.lora_b"} <= tensors.keys():
            raise AdapterFileError(f"{path} has no factors {name}.lora_a and {name}.lora_b, which {layer} should have.")
        A, B = (values(tensors[f"{name}.lora_{end}"]) for end in "ab")
        found[layer] = Factors(A, layout.rows(parameter, B, back=True) * (alpha / A.shape[0]))
    return found


def read_weights(path: Path, model: Any) -> Iterator[tuple[str, Tensor, str]]:
    """(parameter's name, its values in float32, the file's number format) of each of a model's parameters, one by one.

    Args:
        path: the file.
        model: the model in transformers' layout; its weights may be on the meta device.

    Raises:
        AdapterFileError: a parameter is not in it.
    """
    reader: Any = import_gguf().GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    layout = Layout(model)
    for parameter, _ in model.named_parameters():
        name = layout.name(parameter)
        if name not in tensors:
            raise AdapterFileError(f"{path} has no tensor {name}, which the model's {parameter} should be.")
        yield parameter, layout.rows(parameter, values(tensors[name]), back=True), tensors[name].tensor_type.name
