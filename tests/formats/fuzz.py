"""Every kind of file that bonetune reads, and mutations of their bytes and of what the bytes say.

A kind makes whole files in a folder and reads them again. What a reader makes of mutated ones is its own clear error, or
success: anything else is a defect. A mutation follows from its seed alone.
"""

import copy
import io
import json
import random
import shutil
import struct
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from formats import rwkv_files
from safetensors.torch import load_file, save_file

from bonetune import BonetuneError
from bonetune.files import RUN_FILE, SUMMARY_FILE
from bonetune.formats import bare, bone, lora, miss, read_adapter, rwkv
from bonetune.formats.checkpoint import INDEX_FILE, Checkpoint
from bonetune.formats.tensors import ADAPTER_CONFIG, ADAPTER_FILES
from bonetune.merging.pth import merge_pth
from bonetune.models import load_model

PREFIX = "base_model.model.model.layers.0.self_attn."


@dataclass(frozen=True)
class Kind:
    """What files to mutate, how they are made in a folder, and how they are read from it."""

    files: tuple[str, ...]
    make: Callable[[Path], None]
    read: Callable[[Path], Any]


def adapter_folder(
    folder: Path, peft_type: str = "BONE", suffix: str = "bone_block", file: str = ADAPTER_FILES[0], **settings: Any
) -> None:
    """A whole adapter for the llama of conftest.py, r=8, on q_proj (32, 32) and k_proj (16, 32), with what a run leaves."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": peft_type, "r": 8, "init_weights": True, "target_modules": ["q_proj", "k_proj"]}
    config |= {"task_type": "CAUSAL_LM", "layers_to_transform": [0], "base_model_name_or_path": None, "bias": "none"}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config | settings))
    (folder / SUMMARY_FILE).write_text(json.dumps({"classes": None, "base_fingerprint": "0" * 64}))
    run = {"quantization": None, "bnb_4bit_use_double_quant": False, "dtype": "auto", "trust_remote_code": False}
    (folder / RUN_FILE).write_text(json.dumps(run))
    generator = torch.Generator().manual_seed(0)
    shapes = {"q_proj": (8, 32), "k_proj": (8, 16)}
    tensors = {f"{PREFIX}{name}.{suffix}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if file.endswith(".bin"):
        torch.save(tensors, folder / file)
    else:
        save_file(tensors, folder / file, metadata={"format": "pt"})


def lora_folder(folder: Path) -> None:
    """The same adapter as LoRA: A is the repeated identity."""
    adapter_folder(folder, "LORA", "lora_B.weight", lora_alpha=8)
    tensors = {name: tensor.T.contiguous() for name, tensor in load_file(folder / ADAPTER_FILES[0]).items()}
    tensors |= {name.replace("lora_B", "lora_A"): torch.eye(8).repeat(1, 4) for name in tensors}
    save_file(tensors, folder / ADAPTER_FILES[0])


def bare_file(folder: Path) -> None:
    """Tensors alone."""
    adapter_folder(folder)
    (folder / ADAPTER_CONFIG).unlink()


def sharded_base(folder: Path) -> None:
    """Two shards with an index and a config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {f"layer.{i}.weight": torch.arange(12.0).reshape(3, 4) + i for i in range(4)}
    weights["layer.0.bias"] = torch.zeros(0)
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    names = sorted(weights)
    where = {name: files[number % 2] for number, name in enumerate(names)}
    for file in files:
        save_file({name: weights[name] for name in names if where[name] == file}, folder / file, metadata={"format": "pt"})
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": 192}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))


def read_base(folder: Path) -> None:
    """Everything of it."""
    checkpoint = Checkpoint(folder)
    for name in checkpoint.stored:
        checkpoint.tensor(name)
    _ = checkpoint.fingerprint, checkpoint.config


def rwkv_adapter(folder: Path, kind: str = "bone", end: str = "disha") -> None:
    """`rwkv-0.pth` and the settings beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(rwkv_files.adapter(kind, 8, end=end), folder / "rwkv-0.pth")
    mode = "bone" if kind == "bone" else "bat"
    (folder / "rwkv-0.json").write_text(json.dumps({"mode": mode, "load": "", "r": 8}))


def rwkv_model(folder: Path) -> None:
    """A base model and an adapter for it."""
    rwkv_adapter(folder)
    torch.save(rwkv_files.base(), folder / "base.pth")


def merge_rwkv(folder: Path) -> None:
    """Into out.pth."""
    merge_pth(rwkv.read(folder / "rwkv-0.pth"), folder / "base.pth", folder / "out.pth")


def kinds(base: str | None = None) -> dict[str, Kind]:
    """By name; with the folder of a base model, adapters are also loaded onto it."""
    tensors, pickle = ADAPTER_FILES
    found = {
        "peft-bone": Kind((ADAPTER_CONFIG, tensors, SUMMARY_FILE), adapter_folder, bone.read),
        "peft-bone, pickled": Kind((pickle,), lambda folder: adapter_folder(folder, file=pickle), bone.read),
        "miss": Kind((ADAPTER_CONFIG, tensors), lambda folder: adapter_folder(folder, "MISS", "miss_block"), miss.read),
        "rwkv-disha": Kind(("rwkv-0.pth", "rwkv-0.json"), rwkv_adapter, lambda folder: rwkv.read(folder / "rwkv-0.pth")),
        "rwkv-bone": Kind(
            ("rwkv-0.pth",),
            lambda folder: rwkv_adapter(folder, "bat-row", "bone"),
            lambda folder: rwkv.read(folder / "rwkv-0.pth"),
        ),
        "lora": Kind((ADAPTER_CONFIG, tensors), lora_folder, lora.read),
        "tensors": Kind((tensors,), bare_file, lambda folder: bare.read(folder / tensors, "bone")),
        "by its content": Kind((ADAPTER_CONFIG, tensors), adapter_folder, read_adapter),
        "rwkv base": Kind(("base.pth", "rwkv-0.pth"), rwkv_model, merge_rwkv),
        "base": Kind((INDEX_FILE, "model-00001-of-00002.safetensors", "config.json"), sharded_base, read_base),
    }
    if base is not None:
        found["loaded"] = Kind(
            (ADAPTER_CONFIG, tensors, SUMMARY_FILE, RUN_FILE), adapter_folder, lambda folder: load_model(str(folder), base=base)
        )
    return found


def mutated(content: bytes, random_: random.Random) -> bytes:
    """Other bytes, by one to three mutations."""
    for _ in range(random_.choice((1, 1, 2, 3))):
        content = random_.choice(_fitting(content))(content, random_)
    return content


def fuzz(folder: Path, of: dict[str, Kind], seconds: float, first_seed: int = 0) -> int:
    """Mutate and read files of these kinds in turn for so long; return the number of mutations.

    Raises:
        AssertionError: a reader raised something that is not an error of bonetune's; names the kind, file and seed, and
            chains what was raised.
    """
    whole = {}
    for name, kind in of.items():
        kind.make(folder / "whole")
        whole[name] = {path.name: path.read_bytes() for path in (folder / "whole").iterdir()}
        kind.read(folder / "whole")
        shutil.rmtree(folder / "whole")
    seed, end = first_seed, time.monotonic() + seconds
    while time.monotonic() < end:
        for name, kind in of.items():
            once(folder / "mutated", name, kind, whole[name], seed)
            seed += 1
    return seed - first_seed


def once(folder: Path, name: str, kind: Kind, whole: dict[str, bytes], seed: int) -> None:
    """One mutation, by its seed."""
    random_ = random.Random(seed)
    file = random_.choice(kind.files)
    folder.mkdir()
    for other, content in whole.items():
        (folder / other).write_bytes(content)
    (folder / file).write_bytes(mutated(whole[file], random_))
    try:
        kind.read(folder)
    except BonetuneError:
        pass
    except Exception as error:
        kept = folder.with_name(f"seed-{seed}")
        folder.rename(kept)
        raise AssertionError(f"{name}: {file}, seed {seed}, kept in {kept}: {type(error).__name__}: {error}") from error
    shutil.rmtree(folder)


def _fitting(content: bytes) -> list[Callable[[bytes, random.Random], bytes]]:
    any_bytes = [_flip, _flip, _truncate, _splice, _insert]
    if content[:2] == b"PK":
        return [*any_bytes, _pickle_bytes, _pickle_bytes, _pickle_bytes, _record]
    if content[:1] == b"{":
        return [*any_bytes, _json_value, _json_value, _json_value, _json_twice]
    if content[8:9] == b"{":
        return [*any_bytes, _header_length, _header, _header, _header, _header_twice]
    return any_bytes


def _flip(content: bytes, random_: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(random_.choice((1, 1, 2, 8))):
        if changed:
            changed[random_.randrange(len(changed))] ^= 1 << random_.randrange(8)
    return bytes(changed)


def _truncate(content: bytes, random_: random.Random) -> bytes:
    return content[: random_.randrange(len(content) + 1)]


def _splice(content: bytes, random_: random.Random) -> bytes:
    """Some bytes again, at another place."""
    at, start, stop = (random_.randrange(len(content) + 1) for _ in range(3))
    over = random_.choice((0, abs(stop - start)))
    return content[:at] + content[min(start, stop) : max(start, stop)] + content[at + over :]


def _insert(content: bytes, random_: random.Random) -> bytes:
    at = random_.randrange(len(content) + 1)
    return content[:at] + random_.randbytes(random_.choice((1, 4, 100))) + content[at:]


_NUMBERS = (0, -1, 1, 2**31, 2**63, -(2**64), 10**30, 0.5, -0.0, float("nan"), float("inf"), 1e308)
_TEXTS = ("", "x", "bat", "bone", "mini", "../../x", "/etc/passwd", "a" * 5000, "\0", "\ud800", "F64", "F8_E4M3", "(a", "*")
_OTHERS = (None, True, False, [], {}, [[]], [None], ["x"], [-1], [2**40] * 2, [0, 0], {"a": None}, {"(": 1}, {"q_proj": "x"})
_DEEP = "nested"


def _hostile(random_: random.Random) -> Any:
    return random_.choice((*_NUMBERS, *_TEXTS, *_OTHERS, _DEEP))


def _json_changed(value: Any, random_: random.Random) -> Any:
    """One value replaced, removed, renamed or taken from elsewhere."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    if not places or random_.random() < 0.03:
        return _hostile(random_)
    holder, key = random_.choice(places)
    match random_.randrange(5):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[str(_hostile(random_))] = holder.pop(key)
        case 2:
            other, there = random_.choice(places)
            holder[key] = copy.deepcopy(other[there])
        case _:
            holder[key] = _hostile(random_)
    return value


def _places(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inside in list(items):
        yield value, key
        yield from _places(inside)


def _dumped(value: Any) -> bytes:
    return json.dumps(value).replace(f'"{_DEEP}"', "[" * 5000 + "]" * 5000).encode()


def _json_value(content: bytes, random_: random.Random) -> bytes:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return _flip(content, random_)
    return _dumped(_json_changed(value, random_))


def _json_twice(content: bytes, random_: random.Random) -> bytes:
    """A key given twice."""
    key, value = (
        random_.choice(('"r"', '"peft_type"', '"weight_map"', '"mode"', '"target_modules"')),
        _dumped(_hostile(random_)),
    )
    return content.rstrip().removesuffix(b"}") + b", " + key.encode() + b": " + value + b"}"


def _header_length(content: bytes, random_: random.Random) -> bytes:
    length = int.from_bytes(content[:8], "little")
    other = random_.choice((0, 1, length - 1, length + 1, length + 8, len(content), len(content) - 8, 2**31, 2**63, 2**64 - 1))
    return struct.pack("<Q", other % 2**64) + content[8:]


def _with_header(content: bytes, change: Callable[[bytes], bytes]) -> bytes:
    length = int.from_bytes(content[:8], "little")
    header = change(content[8 : 8 + length])
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def _header(content: bytes, random_: random.Random) -> bytes:
    return _with_header(content, lambda header: _json_value(header, random_))


def _header_twice(content: bytes, random_: random.Random) -> bytes:
    def change(header: bytes) -> bytes:
        try:
            names = list(json.loads(header))
        except (ValueError, RecursionError):
            return header
        entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, random_.choice((0, 4, 8, 2**40))]}
        name = json.dumps(random_.choice(names)) if names else '"a"'
        return header.rstrip().removesuffix(b"}") + b", " + name.encode() + b": " + json.dumps(entry).encode() + b"}"

    return _with_header(content, change)


def _pickle_bytes(content: bytes, random_: random.Random) -> bytes:
    """Other bytes in the pickle, in an archive that is whole."""
    return _archive(content, random_, lambda name: name.endswith("data.pkl"))


def _record(content: bytes, random_: random.Random) -> bytes:
    """Other bytes in any record."""
    return _archive(content, random_, lambda name: random_.random() < 0.3)


def _archive(content: bytes, random_: random.Random, chosen: Callable[[str], bool]) -> bytes:
    written = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(written, "w") as new:
            for name in old.namelist():
                record = old.read(name)
                if chosen(name):
                    record = random_.choice((_flip, _flip, _truncate, _splice, _insert, _opcode))(record, random_)
                new.writestr(name, record, random_.choice((zipfile.ZIP_STORED,) * 20 + (zipfile.ZIP_DEFLATED,)))
    except Exception:  # an earlier mutation left no archive
        return _flip(content, random_)
    return written.getvalue()


def _opcode(content: bytes, random_: random.Random) -> bytes:
    """Numbers, names and calls where others stood."""
    numbers = (b"M\xff\xff", b"J\xff\xff\xff\x7f", b"K\x00", b"\x8a\x09" + b"\xff" * 8 + b"\x7f")
    names = (b"cos\nsystem\n", b"ctorch\nload\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nDoubleStorage\n")
    calls = (b"N", b"]", b"}", b")", b"0", b"2", b"R", b"b", b"Q")
    at = random_.randrange(len(content) + 1)
    return content[:at] + random_.choice(numbers + names + calls) + content[at + random_.choice((0, 1, 2, 5)) :]
