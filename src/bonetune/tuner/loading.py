"""Adapter files against the model that they are loaded into: everything that does not fit is named in one error."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from bonetune.errors import AdapterFileError
from bonetune.tuner.config import BoneConfig
from bonetune.tuner.layer import BoneLayer


def is_of_november_2024(config: BoneConfig, tensors: Sequence[Tensor]) -> bool:
    """PEFT's development version of November 2024 wrote bat as `init_weights: true` with three-dimensional blocks."""
    return not config.variant_was_named and config.variant == "bone" and bool(tensors) and all(t.dim() == 3 for t in tensors)


def check_tensors(
    config: BoneConfig,
    adapter_name: str,
    layers: dict[str, BoneLayer],
    tensors: dict[str, Tensor],
    known: set[str],
    whole: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Raise `AdapterFileError` naming every tensor that is missing, unexpected or of another shape.

    Args:
        config: the adapter's.
        adapter_name: its name in the model.
        layers: tensor name to the layer that is to hold it.
        tensors: what the file holds, under the model's names.
        known: all names of the model's tensors.
        whole: the shapes of those that the adapter trains whole, by their names in the model.
    """
    whole = whole or {}
    wrong = [f"{key} is missing" for key in (*layers, *whole) if key not in tensors]
    known |= set(layers)
    wrong += [
        f"{key} is not expected"
        for key in tensors
        # PEFT's wrappers of whole modules write names that no module has (with bias="all") and pass over them in loading
        if not {key, key.removeprefix("base_model.model.")} & known and ".modules_to_save." not in key
    ]
    for key, layer in layers.items():
        expected = layer.tensor_shape(layer.bone_spec[adapter_name])
        if key in tensors and tuple(tensors[key].shape) != expected:
            wrong.append(f"{key} has shape {tuple(tensors[key].shape)}, {config.variant} needs {expected}")
    for key, shape in whole.items():
        if key in tensors and tuple(tensors[key].shape) != tuple(shape):
            wrong.append(f"{key} has shape {tuple(tensors[key].shape)}, the base model's {tuple(shape)}")
    if wrong:
        raise AdapterFileError(
            f"The adapter's tensors do not fit its configuration (variant {config.variant!r}, r={config.r}) and this model: "
            f"{'; '.join(wrong)}."
        )
