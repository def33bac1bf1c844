"""RWKV-PEFT's `rwkv-{epoch}.pth`: the adapter's tensors by name (`blocks.0.att.receptance.disha`), and those trained whole.

What a tensor of an adapter means there, by the time it was written:

| name     | shape          | variant    | since                                                      |
|----------|----------------|------------|------------------------------------------------------------|
| `.disha` | (r, out)       | `bone`     | February 2025                                              |
| `.disha` | (in/r, r, r)   | `bat-row`  | February 2025                                              |
| `.bone`  | (r, out)       | `bone`     | November 2024                                              |
| `.bone`  | (in/r, r, r)   | `bat-row`  | September 2024                                             |
| `.bone`  | (out/r, r, r)  | `bat`      | before                                                     |
| `.bone`  | (out, r)       | `bat`      | before; B (out/r, r, r), its first two dimensions as one   |

State tuning leaves `blocks.0.att.time_state` (heads, V, K) of each block, and nothing else.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bonetune.errors import AdapterFileError, InputError
from bonetune.files import file_written_beside, read_config
from bonetune.formats.state import AdapterState, Source
from bonetune.formats.tensors import read_tensors, sha256
from bonetune.spec import Variant, parse_variant
from bonetune.tuner import BoneConfig

NAME = "rwkv-disha"
_LAYER = re.compile(r"blocks\.\d+\.(?:att\.(?:receptance|key|value|gate|output)|ffn\.(?:key|receptance|value))")
_PARAMETER = re.compile(r"(?:blocks\.\d+\.(?:att|ffn|ln\d)|emb|head|ln_out)\.\w+(?:\.(?:weight|bias))?")
_STATE = re.compile(r"blocks\.\d+\.att\.time_state")
# Where the settings of a run may lie, beside the file.
_CONFIGS = ("disha_config.json", "bone_config.json", "peft_config.json")
# A `mode` and what it may be here: settings name no older forms, which had none.
_MODES: dict[str, Variant] = {"bone": "bone", "bat": "bat-row"}


def read(path: Path, variant: str | None = None, config: Path | Mapping[str, Any] | None = None) -> AdapterState:
    """Read an adapter file of RWKV-PEFT.

    Args:
        path: the `.pth` file.
        variant: bone, bat-row or bat, where the file does not prove it.
        config: RWKV-PEFT's settings, `{"mode": "bone", "load": "", "r": 64}`, or a file of them; None takes what lies beside
            the file (its name with `.json`, disha_config.json, bone_config.json, peft_config.json), if anything does.

    Raises:
        AdapterFileError: it is none, its tensors disagree with each other or with the settings, or they can be read in two
            ways; the message says what to pass.
    """
    content = read_tensors(path)
    if content and all(_STATE.fullmatch(name) for name in content):
        return _states(path, content)
    ends = {name.rpartition(".")[2] for name in content} & {"disha", "bone"}
    if len(ends) != 1:
        raise AdapterFileError(_no_adapter(path, content, ends))
    (end,) = ends
    tensors = {name.removesuffix(f".{end}"): tensor for name, tensor in content.items() if name.endswith(f".{end}")}
    whole = {name: tensor for name, tensor in content.items() if not name.endswith(f".{end}")}
    wrong = [name for name in tensors if not _LAYER.fullmatch(name)]
    wrong += [name for name in whole if not _PARAMETER.fullmatch(name)]
    if wrong:
        raise AdapterFileError(f"{path} has {len(wrong)} tensors that no RWKV model has a place for: {', '.join(wrong[:5])}.")
    asked = None if variant is None else parse_variant(variant)
    settings, said_by = _settings(path, config)
    said = _MODES[settings["mode"]] if "mode" in settings else None
    found, proven, reason = _found(path, end, tensors, whole)
    for who, named in (("the call", asked), (said_by, said)):
        if named and proven and named != found:
            raise AdapterFileError(f"{path} holds {found} ({reason}), and {who} says {named}.")
    if asked and said and asked != said:
        raise AdapterFileError(f"{said_by} says {said}, and the call says {asked}: keep one.")
    meant = asked or said or found
    if meant is None:
        raise AdapterFileError(f"{path}: {reason}.")
    reason = "as asked for" if asked else f"as {said_by} says" if said else reason
    tensors, r = _as_variant(path, tensors, meant)
    if settings.get("r", r) != r:
        raise AdapterFileError(f"{path} has tensors of r={r}, and {said_by} says r={settings['r']!r}.")
    bone = BoneConfig(r=r, variant=meant, target_modules=sorted(tensors), trainable_parameters=sorted(whole))
    source = Source(NAME, str(path), {path.name: sha256(path)})
    return AdapterState(bone, tensors, whole, source, (f"variant {meant}: {reason}",)).check()


def write(state: AdapterState, path: Path) -> None:
    """Write an adapter file that RWKV-PEFT loads and merges, in the names of today (`.disha`).

    Raises:
        InputError: RWKV-PEFT does not have the variant, the layers, or a setting that the adapter needs.
    """
    config = state.config
    if state.tensors and config.variant not in _MODES.values():
        others = "miss" if config.variant in ("mini", "bat") else "peft-bone"
        raise InputError(
            f"RWKV-PEFT has no variant {config.variant}: it knows bone and bat-row. Write {others}, or merge the adapter."
        )
    if wrong := [name for name in state.tensors if not _LAYER.fullmatch(name)]:
        raise InputError(f"RWKV-PEFT adapts layers like blocks.0.att.key, and {wrong[0]} is none (of {len(wrong)} such).")
    if wrong := [name for name in state.whole if not _PARAMETER.fullmatch(name)]:
        raise InputError(f"An RWKV model has no parameter {wrong[0]} (of {len(wrong)} such).")
    ranks = {state.spec(name).r for name in state.tensors}
    if len(ranks) > 1:
        raise InputError(f"RWKV-PEFT has one r for all layers, and this adapter has {sorted(ranks)}: merge it.")
    content = {f"{name}.disha": tensor for name, tensor in state.tensors.items()} | state.whole
    with file_written_beside(path) as beside:
        # clones: a view would take its whole storage into the file
        compact = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in content.items()}
        with beside.open("wb") as file:  # of a path, torch hides why it cannot be written
            torch.save(compact, file)


def _states(path: Path, content: dict[str, Tensor]) -> AdapterState:
    bone = BoneConfig(target_modules=[], trainable_parameters=sorted(content))
    source = Source(NAME, str(path), {path.name: sha256(path)})
    return AdapterState(bone, {}, content, source, ("states to begin with, and no adapted layer",)).check()


def _no_adapter(path: Path, content: Mapping[str, Tensor], ends: set[str]) -> str:
    if ends:
        return f"{path} has both .disha and .bone tensors: it was put together from two files."
    if any(re.search(r"\.lora_[AB]$|\.lora_(magnitude|m)$", name) for name in content):
        return f"{path} holds LoRA or PiSSA of RWKV-PEFT, not Bone: merge it with RWKV-PEFT."
    return f"{path} holds no adapter of RWKV-PEFT's: none of its {len(content)} tensors is a .disha or .bone."


def _settings(path: Path, config: Path | Mapping[str, Any] | None) -> tuple[dict[str, Any], str]:
    """RWKV-PEFT's settings by today's names, and who says so."""
    if config is None:
        beside = [path.with_suffix(".json"), *(path.with_name(name) for name in _CONFIGS)]
        config = next((file for file in beside if file.is_file()), None)
    if config is None:
        return {}, ""
    content = dict(config) if isinstance(config, Mapping) else read_config(config)
    said_by = "its configuration" if isinstance(config, Mapping) else str(config)
    settings = {key.removeprefix("bone_"): value for key, value in content.items()}
    settings = {key: value for key, value in settings.items() if key in ("mode", "r")}
    if settings.get("mode", "bone") not in tuple(_MODES):
        raise AdapterFileError(f"{said_by} has mode {settings['mode']!r}, which is none of RWKV-PEFT's: {', '.join(_MODES)}.")
    return settings, said_by


def _found(
    path: Path, end: str, tensors: Mapping[str, Tensor], whole: Mapping[str, Tensor]
) -> tuple[Variant | None, bool, str]:
    """The variant that the file proves, whether it does, and how; None: it may be two, and what to pass."""
    dimensions = {tensor.dim() for tensor in tensors.values()}
    if dimensions not in ({2}, {3}):
        raise AdapterFileError(f"{path} has adapter tensors of {sorted(dimensions)} dimensions, not of 2 (bone) or of 3 (bat).")
    if end == "disha":
        return ("bone", True, "two-dimensional .disha") if dimensions == {2} else ("bat-row", True, "three-dimensional .disha")
    if dimensions == {3}:
        return _found_in_blocks(path, {name: tensor.shape[0] for name, tensor in tensors.items()}, _norms(tensors, whole))
    first, last = ({tensor.shape[side] for tensor in tensors.values()} for side in (0, 1))
    if len(first) == 1 and (len(last) > 1 or max(first) < min(last)):
        return "bone", True, f"two-dimensional .bone, (r, out) with r={max(first)}"
    if len(last) == 1 and len(first) > 1:
        return "bat", True, f".bone of (out, r) with r={max(last)} on layers of {len(first)} widths"
    shapes = ", ".join(map(str, sorted({tuple(tensor.shape) for tensor in tensors.values()})))
    remedy = "pass --variant bone if they are D (r, out), or bat if they are B (out/r, r, r) as (out, r)"
    return None, False, f"its .bone tensors, of {shapes}, do not tell (r, out) from (out, r): {remedy}"


def _found_in_blocks(path: Path, number: Mapping[str, int], square: set[int]) -> tuple[Variant | None, bool, str]:
    """Of B (number, r, r): whether the number is in/r or out/r. `square` has those known of square layers."""
    keys = {count for name, count in number.items() if name.endswith("ffn.key")}  # out > in
    values = {count for name, count in number.items() if name.endswith("ffn.value")}  # in > out
    square = square | {count for name, count in number.items() if not name.endswith(("ffn.key", "ffn.value"))}
    verdicts: set[Variant] = set()
    if keys and square:
        verdicts.add("bat-row" if keys == square else "bat")
    if values and square:
        verdicts.add("bat" if values == square else "bat-row")
    if keys and values:
        verdicts.add("bat-row" if max(keys) < min(values) else "bat")
    if len(verdicts) == 2:
        raise AdapterFileError(f"{path} has .bone tensors of {sorted(set(number.values()))} blocks, which fit no RWKV model.")
    if not verdicts:
        remedy = "pass --variant bat-row (what was written since September 2024) or bat (before)"
        return None, False, f"no layer tells whether its .bone tensors are (in/r, r, r) or (out/r, r, r): {remedy}"
    sides = "in/r" if verdicts == {"bat-row"} else "out/r"
    return verdicts.pop(), True, f"three-dimensional .bone of {sides} blocks, by layers that are not square"


def _norms(tensors: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> set[int]:
    """n_embd/r, from norms that were trained whole."""
    r = max(next(iter(tensors.values())).shape[-1], 1)
    return {tensor.numel() // r for name, tensor in whole.items() if re.fullmatch(r"blocks\.\d+\.ln[12]\.(weight|bias)", name)}


def _as_variant(path: Path, tensors: Mapping[str, Tensor], variant: Variant) -> tuple[dict[str, Tensor], int]:
    """The tensors in the shapes of `bonetune.spec`, and r."""
    two = {tensor.dim() for tensor in tensors.values()} == {2}
    if variant not in (("bone", "bat") if two else ("bat-row", "bat")):
        raise AdapterFileError(f"{path} has tensors of {2 if two else 3} dimensions, which cannot be {variant}.")
    ranks = {tensor.shape[0] if variant == "bone" else tensor.shape[-1] for tensor in tensors.values()}
    if len(ranks) > 1 or not min(ranks):
        raise AdapterFileError(f"{path} has tensors of r={sorted(ranks)} as {variant}; RWKV-PEFT has one r for all layers.")
    r = ranks.pop()
    if two and variant == "bat":
        if ragged := [name for name, tensor in tensors.items() if len(tensor) % r]:
            raise AdapterFileError(f"{path} cannot hold bat of r={r}: {ragged[0]} has {len(tensors[ragged[0]])} rows.")
        return {name: tensor.reshape(-1, r, r) for name, tensor in tensors.items()}, r
    return dict(tensors), r
