"""What a user names as a model: a Hugging Face folder or id, or the folder of an adapter on one."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bonetune.errors import AdapterFileError, BonetuneError, InputError

ADAPTER_CONFIG = "adapter_config.json"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Loaded:
    """A model ready for use: `model` in evaluation mode, its tokenizer, and where both came from."""

    model: Any
    tokenizer: Any
    base: str
    adapter: str | None = None


def parse_dtype(name: str) -> torch.dtype | str:
    """float32, bfloat16, float16 as torch dtypes; `auto`, the checkpoint's own, as it is. Else `InputError`."""
    if name == "auto":
        return name
    if name not in _DTYPES:
        raise InputError(f"Unknown dtype {name!r}: choose auto, {', '.join(_DTYPES)}.")
    return _DTYPES[name]


def load_base(name: str, dtype: str = "auto") -> Loaded:
    """Load a causal language model and its tokenizer.

    Args:
        name: a folder written by `save_pretrained`, or an id on the hub.
        dtype: of the weights; `auto` takes the checkpoint's.

    Raises:
        InputError: there is no such model, or no tokenizer beside it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"Model folder {name} has no config.json: it is not a Hugging Face model.")
    if not path.is_dir() and (path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise InputError(f"Model folder {name} does not exist.")
    wanted = parse_dtype(dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=wanted)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"Model {name!r} cannot be loaded as a causal language model with its tokenizer: {reason}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Loaded(model.eval(), tokenizer, name)


def load_model(name: str, dtype: str = "auto", base: str | None = None) -> Loaded:
    """Load a model, or an adapter on its base model.

    Args:
        name: as for `load_base`, or the folder of an adapter.
        dtype: of the base model's weights.
        base: the adapter's base model, if it is not where adapter_config.json says.

    Raises:
        InputError: there is no such model, or the adapter does not say what it was trained on.
        AdapterFileError: the adapter's tensors do not fit the base model.
    """
    folder = Path(name)
    if not (folder / ADAPTER_CONFIG).is_file():
        if base is not None:
            raise InputError(f"{name} is not an adapter folder (no {ADAPTER_CONFIG} in it), so it takes no base model.")
        return load_base(name, dtype)

    from peft import PeftModel
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    import bonetune  # noqa: F401  (makes BONE known to PEFT, whoever calls this)

    loaded = load_base(_base_of(folder, base), dtype)
    try:
        model = PeftModel.from_pretrained(loaded.model, name)
    except KeyError as error:
        raise AdapterFileError(f"Adapter {name} lacks the tensor {error.args[0]}.") from error
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        if isinstance(error, BonetuneError):
            raise
        raise AdapterFileError(f"Adapter {name} cannot be loaded onto {loaded.base}: {error}") from error
    tokenizer = loaded.tokenizer
    if (folder / "tokenizer_config.json").is_file():  # what it was trained with; a chat template may have been added
        tokenizer = AutoTokenizer.from_pretrained(name)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return Loaded(model.eval(), tokenizer, loaded.base, adapter=name)


def _base_of(folder: Path, given: str | None) -> str:
    """The base model's name, after checking that the folder is an adapter's that can be loaded."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AdapterFileError(f"{folder / ADAPTER_CONFIG} is not JSON: {error}.") from error
    if "peft_type" not in config:
        raise AdapterFileError(f"{folder / ADAPTER_CONFIG} has no peft_type: it does not say which method the adapter is of.")
    if config["peft_type"] not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise AdapterFileError(f"{folder / ADAPTER_CONFIG}: PEFT knows no method {config['peft_type']!r}.")
    if not any((folder / name).is_file() for name in ("adapter_model.safetensors", "adapter_model.bin")):
        raise AdapterFileError(f"Adapter {folder} has a configuration but no weights (adapter_model.safetensors).")
    if given is not None:
        return given
    if not config.get("base_model_name_or_path"):
        raise InputError(f"{folder / ADAPTER_CONFIG} names no base model: pass --base MODEL.")
    return config["base_model_name_or_path"]
