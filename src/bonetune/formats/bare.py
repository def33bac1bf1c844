"""Tensors of an adapter without a configuration beside them: what they mean has to be said."""

from pathlib import Path

from torch import Tensor

from bonetune.errors import AdapterFileError, InputError
from bonetune.formats.state import AdapterState, Source, rank_settings
from bonetune.formats.tensors import ADAPTER_CONFIG, ADAPTER_FILES, read_tensors, sha256
from bonetune.spec import VARIANTS, ShardSpec, Variant, parse_variant
from bonetune.tuner import BoneConfig

NAME = "tensors"
_SUFFIXES = (".bone_block", ".miss_block")


def read(path: Path, variant: str | None = None) -> AdapterState:
    """Read tensors named `...bone_block` or `...miss_block`, with or without PEFT's prefix and an adapter's name.

    Args:
        path: the file, or a folder that holds adapter_model.safetensors and no configuration.
        variant: what they are; a shape never tells.

    Raises:
        InputError: no variant is given.
        AdapterFileError: they cannot be that.
    """
    folder = path if path.is_dir() else path.parent
    if (folder / ADAPTER_CONFIG).is_file():
        raise InputError(f"{path} has {ADAPTER_CONFIG} beside it, which says what it is: pass the folder, without --from.")
    file = path if path.is_file() else next((path / name for name in ADAPTER_FILES if (path / name).is_file()), path)
    tensors, whole = {}, {}
    for name, tensor in read_tensors(file).items():
        layer = _layer(name)
        if layer is None:
            whole[name.removeprefix("base_model.model.").replace(".base_layer.", ".")] = tensor
        else:
            tensors[layer] = tensor
    if not tensors:
        raise InputError(f"{path} holds no tensor named ...{' or ...'.join(_SUFFIXES)}.")
    possible = [name for name in VARIANTS if all(t.dim() == (3 if ShardSpec(name).blockwise else 2) for t in tensors.values())]
    says = f"By its tensors' shapes it may be {', '.join(possible) or 'none of the family'}"
    if variant is None:
        raise InputError(f"{path} does not say which variant it is. {says}: pass --variant.")
    kind = parse_variant(variant)
    if kind not in possible:
        raise AdapterFileError(f"{path} cannot be read as {kind}. {says}.")
    ranks = {layer: _r(tensor, kind) for layer, tensor in tensors.items()}
    most, others = rank_settings(ranks)
    config = BoneConfig(
        r=most,
        variant=kind,
        mini_r=next(iter(tensors.values())).shape[-1] if kind == "mini" else 1,
        target_modules=sorted(tensors),
        rank_pattern=others,
    )
    state = AdapterState(config, tensors, whole, Source(NAME, str(path), {file.name: sha256(file)}))
    return state.with_notes(f"the file has no configuration; read as {kind}, as it was told").check()


def _layer(name: str) -> str | None:
    name = name.removeprefix("base_model.model.").removesuffix(".default")
    return next((name.removesuffix(suffix) for suffix in _SUFFIXES if name.endswith(suffix)), None)


def _r(tensor: Tensor, variant: Variant) -> int:
    return int(tensor.shape[-1] if ShardSpec(variant).blockwise else tensor.shape[-2]) if tensor.dim() > 1 else 0
