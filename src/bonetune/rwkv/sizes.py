"""From the names and shapes of a file's tensors to the model that they are of."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Size
from transformers.initialization import no_init_weights

from bonetune.errors import InputError
from bonetune.rwkv.configuration import RwkvConfig, Version
from bonetune.rwkv.model import RwkvForCausalLM

# What tells the versions that are not for here, by the end of a tensor's name in some block.
_OTHERS = {
    ".ffn.s_emb.weight": "RWKV-7a (DeepEmbed)",
    ".ffn.s_emb_x.weight": "RWKV-7a (DeepEmbed)",
    ".att.time_mix_g": "RWKV-5 (x051, x052)",
    ".att.time_mix_k": "RWKV-4 (x040)",
}
_PROOFS: dict[Version, str] = {"x060": ".att.time_maa_x", "x070": ".att.r_k"}
_BLOCK = re.compile(r"blocks\.([0-9]{1,6})\.")
_MOST_NAMED = 8


def config_of(shapes: Mapping[str, Size], source: str, **settings: Any) -> RwkvConfig:
    """The sizes of the model whose tensors these are.

    Args:
        shapes: of all tensors, by name.
        source: where they are from, for messages.
        settings: for `RwkvConfig`, beside the sizes.

    Raises:
        InputError: no RWKV model, a version that is not for here, tensors of two versions, or tensors that are missing,
            unexpected or of other shapes than the others say; all of them in one message.
    """
    version = _version(shapes, source)
    heads, n = _sides(shapes, f"blocks.0{'.att.time_faaaa' if version == 'x060' else '.att.r_k'}", source)
    vocabulary, width = _sides(shapes, "emb.weight", source)
    if heads * n != width:
        raise InputError(f"{source} has {heads} heads of {n} features, which do not make its {width} a token.")
    inner, _ = _sides(shapes, "blocks.0.ffn.key.weight", source)
    config = RwkvConfig(
        version=version,
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=_number_of_blocks(shapes, source),
        head_size=n,
        ranks=_ranks(shapes, version, source),
        unused_in_first="blocks.0.att.v0" in shapes,
        initial_state=any(name.endswith(".att.time_state") for name in shapes),
        **settings,
    )
    _check(shapes, config, source)
    return config


def skeleton_of(config: RwkvConfig) -> RwkvForCausalLM:
    """The model of these sizes, without values: its parameters are on the meta device."""
    with torch.device("meta"), no_init_weights():
        return RwkvForCausalLM(config)


def _version(shapes: Mapping[str, Size], source: str) -> Version:
    found: list[Version] = [version for version, end in _PROOFS.items() if any(name.endswith(end) for name in shapes)]
    if len(found) == 2:
        raise InputError(f"{source} has tensors of {' and of '.join(found)}: it was put together from two models.")
    for end, name in _OTHERS.items():
        if any(tensor.endswith(end) for tensor in shapes):
            raise InputError(f"{source} is {name}, and RWKV-6 (x060) and RWKV-7 (x070) are what runs here.")
    if not found:
        names = ", ".join(sorted(shapes)[:3]) or "none at all"
        raise InputError(f"{source} is no RWKV-6 or RWKV-7 model: its tensors are {names}, ...")
    return found[0]


def _number_of_blocks(shapes: Mapping[str, Size], source: str) -> int:
    """Raises before anything is built of a number that only a forged file has."""
    numbers = {int(found[1]) for name in shapes if (found := _BLOCK.match(name))}
    if missing := sorted(set(range(len(numbers))) - numbers):
        raise InputError(f"{source} has blocks up to {max(numbers)}, and blocks.{missing[0]} is missing: it is not whole.")
    return len(numbers)


def _sides(shapes: Mapping[str, Size], name: str, source: str) -> tuple[int, int]:
    shape = shapes.get(name)
    if shape is None:
        raise InputError(f"{source} lacks {name}, which tells a size of the model.")
    if len(shape) != 2 or 0 in shape:
        raise InputError(f"{source} has {name} of shape {tuple(shape)}, and it should be a matrix.")
    return shape[0], shape[1]


def _ranks(shapes: Mapping[str, Size], version: Version, source: str) -> dict[str, int]:
    if version == "x060":
        maa, decay = (_sides(shapes, f"blocks.0.att.time_{name}_w1", source)[1] for name in ("maa", "decay"))
        return {"maa": maa // 5, "decay": decay}
    # the first block may have no v1
    block = "0" if "blocks.0.att.v1" in shapes else "1"
    ranks = {name: _sides(shapes, f"blocks.0.att.{name}1", source)[1] for name in "wag"}
    v1 = f"blocks.{block}.att.v1"
    return ranks | ({"v": _sides(shapes, v1, source)[1]} if v1 in shapes else {})


def _check(shapes: Mapping[str, Size], config: RwkvConfig, source: str) -> None:
    expected = {name: tensor.shape for name, tensor in skeleton_of(config).state_dict().items()}
    wrong = [f"{name} is missing" for name in expected if name not in shapes]
    wrong += [f"{name} is not expected" for name in shapes if name not in expected]
    wrong += [
        f"{name} has shape {tuple(shape)}, not {tuple(expected[name])}"
        for name, shape in shapes.items()
        if name in expected and shape != expected[name]
    ]
    if wrong:
        more = f"; and {len(wrong) - _MOST_NAMED} more" if len(wrong) > _MOST_NAMED else ""
        raise InputError(f"{source} is no whole {config.version} model: {'; '.join(wrong[:_MOST_NAMED])}{more}.")
