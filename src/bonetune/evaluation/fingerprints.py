"""What the answers of a model depend on, in fingerprints: by them an evaluation that goes on knows its model again."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bonetune.errors import InputError
from bonetune.evaluation.task import digest
from bonetune.files import RUN_FILE, SUMMARY_FILE, read_config
from bonetune.formats.checkpoint import fingerprint_of, local_folder
from bonetune.formats.tensors import ADAPTER_CONFIG, ADAPTER_FILES, sha256
from bonetune.models import Loaded
from bonetune.rwkv.weights import is_pth

# What the files of an adapter's run say of how it is asked, and those of a model, its weights apart.
_RUN_FILES = (RUN_FILE, SUMMARY_FILE)
_CONFIGS = ("config.json", "generation_config.json")
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "vocab.txt", "merges.txt", "*.model", "rwkv_vocab*.txt",
)  # fmt: skip
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf")
_WHOLE_BYTES = 1 << 24  # of a tensor in memory that is larger, parts are hashed


def name_of(model: str | Loaded) -> str:
    """What a model is called: its adapter's folder, else its own name."""
    return (model.adapter or model.base) if isinstance(model, Loaded) else model


def fingerprints(model: str | Loaded, base: str | None) -> dict[str, tuple[str, str | None]]:
    """Fingerprints of all of a model that answers depend on, each with what it is of; None: there is none to be had.

    What lies on the hub is fetched, as it will have to be. A loaded model is known by what is in memory.
    """
    name = name_of(model)
    found: dict[str, tuple[str, str | None]] = {}
    adapter = Path(name) if (Path(name) / ADAPTER_CONFIG).is_file() else None
    if isinstance(model, Loaded):
        found["weights"] = (name, _state_print(model.model))
        found["tokenizer"] = (name, _tokenizer_print(model.tokenizer))
    elif adapter is not None:
        tensors = next((adapter / file for file in ADAPTER_FILES if (adapter / file).is_file()), None)
        found["weights"] = (name, None if tensors is None else sha256(tensors))
        found["adapter_config"] = (name, _files_print(adapter, (ADAPTER_CONFIG,)))
        base = base or read_config(adapter / ADAPTER_CONFIG).get("base_model_name_or_path")
        found["tokenizer"] = (name, _files_print(adapter, _TOKENIZER))
    else:
        found |= _of_model(name, "")
    found["run"] = (name, _files_print(Path(name), _RUN_FILES))
    if base and not (isinstance(model, Loaded) and hasattr(model.model, "disable_adapter")):
        found |= _of_model(base, "base_")
    return found


def _of_model(name: str, prefix: str) -> dict[str, tuple[str, str | None]]:
    """A model's fingerprints by its name: of weights, configuration and tokenizer."""
    found = {"weights": fingerprint_of(name, fetch=True)}
    try:
        folder = Path(name).parent if is_pth(name) else local_folder(name)
    except InputError:
        return {f"{prefix}weights": (name, None)}
    if found["weights"] is None and not is_pth(name):
        if folder.parent.name == "snapshots":  # of the hub, where a name is the content's
            found["weights"] = folder.name
        elif any(True for pattern in _WEIGHTS for _ in folder.glob(pattern)):
            found["weights"] = _files_print(folder, _WEIGHTS)
    if not is_pth(name):
        found["config"] = _files_print(folder, _CONFIGS)
    found["tokenizer"] = _files_print(folder, _TOKENIZER)
    return {f"{prefix}{what}": (name, value) for what, value in found.items()}


def _files_print(folder: Path, patterns: Sequence[str]) -> str:
    files = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
    return digest({file.name: sha256(file) for file in files})


def _tokenizer_print(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else tokenizer.get_vocab()
    told = [type(tokenizer).__name__, words, tokenizer.chat_template, tokenizer.special_tokens_map]
    return digest(json.loads(json.dumps(told, default=str)))


@torch.inference_mode()
def _state_print(model: Any) -> str:
    """Of a model in memory: every tensor's name, shape, dtype and bytes, of large ones parts; and its settings."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):  # what a quantization notes besides
            found.update(f"{name} {tensor}\n".encode())
            continue
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        row = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        part = len(row) if len(row) <= _WHOLE_BYTES else 1 << 10
        for start in (0,) if part == len(row) else (0, len(row) // 2, len(row) - part):
            found.update(row[start : start + part].cpu().numpy().tobytes())
    settings: dict[str, Any] = {name: vars(config) for name, config in getattr(model, "peft_config", {}).items()}
    settings |= {name: getattr(model, name).to_dict() for name in ("config", "generation_config") if hasattr(model, name)}
    found.update(json.dumps(settings, sort_keys=True, default=_said).encode())
    return found.hexdigest()


def _said(value: Any) -> str:
    """What JSON has no form for, the same in every process."""
    return repr(sorted(value) if isinstance(value, set) else value)
