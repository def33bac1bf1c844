"""What stands beside the weights of a merged model: configurations, tokenizer, the model's own code."""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from bonetune.errors import InputError
from bonetune.files import CERTIFICATE_FILE, PROMPTS_FILE, SUMMARY_FILE, read_config, write_json
from bonetune.formats.checkpoint import INDEX_FILE, SINGLE_FILE
from bonetune.formats.tensors import ADAPTER_CONFIG
from bonetune.merging.plan import Plan
from bonetune.merging.staging import JOURNAL
from bonetune.models import load_tokenizer
from bonetune.rwkv.tokenizer import VOCABULARY_FILE as WORLD_VOCABULARY

_CONFIG, _GENERATION, _TOKENIZER = "config.json", "generation_config.json", "tokenizer_config.json"
_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab", ".bpe")
_NAMES = ("LICENSE", "NOTICE", "USE_POLICY")
_TEMPLATES = "additional_chat_templates"
# What other verbs leave in a folder, and is not the model's.
_NOT_OURS = (
    *(CERTIFICATE_FILE, PROMPTS_FILE, SUMMARY_FILE, ADAPTER_CONFIG, INDEX_FILE, JOURNAL),
    *("environment.json", "trainer_state.json"),
)
_TOKENIZER_FILES = (
    *(
        "tokenizer.json",
        _TOKENIZER,
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
    ),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    WORLD_VOCABULARY,
)


def write_companions(plan: Plan, folder: Path, *, trust_remote_code: bool = False) -> None:
    """Write everything of the merged model but its weights.

    It is the base model's, byte for byte, but for the dtype and ties in config.json, the tokens at which an answer ends in
    generation_config.json, and the tokenizer, which is the first adapter's if it has one. Python files come along if they are
    trusted.
    """
    base, adapter = plan.checkpoint.folder, Path(plan.states[0].source.path)
    own_tokenizer = (adapter / _TOKENIZER).is_file()
    for item in sorted(base.iterdir()):
        if item.is_file() and _belongs(item, trust_remote_code) and not (own_tokenizer and item.name in _TOKENIZER_FILES):
            shutil.copyfile(item, folder / item.name)
        elif item.is_dir() and item.name == _TEMPLATES and not own_tokenizer:
            shutil.copytree(item, folder / item.name)
    tokenizer = None
    with suppress(*([] if own_tokenizer else [InputError])):  # a base model need not come with one
        tokenizer = load_tokenizer(str(adapter if own_tokenizer else base), trust_remote_code=trust_remote_code)
    if own_tokenizer and tokenizer is not None:
        tokenizer.save_pretrained(folder)
    _write_config(plan, folder)
    if tokenizer is not None and plan.fitted.model.can_generate():
        _write_ends(folder, tokenizer)
    if len(plan.files) > 1 or [*plan.files] != [SINGLE_FILE]:
        _write_index(plan, folder)


def _belongs(item: Path, trusted: bool) -> bool:
    if item.name.startswith(".") or item.name in _NOT_OURS or item.name.endswith(".index.json"):
        return False
    return item.suffix in _SUFFIXES or item.name.startswith(_NAMES) or (trusted and item.suffix == ".py")


def _write_config(plan: Plan, folder: Path) -> None:
    before = plan.checkpoint.config
    config = json.loads(json.dumps(before))
    if plan.dtype is not None:
        name = str(plan.dtype).removeprefix("torch.")
        parts = [config, *(part for part in config.values() if isinstance(part, dict))]
        for part in parts:
            for key in ("dtype", "torch_dtype"):
                if isinstance(part.get(key), str):
                    part[key] = name
        if "torch_dtype" not in config:
            config["dtype"] = name
    if plan.unties:
        config["tie_word_embeddings"] = False
    if config != before:
        write_json(folder / _CONFIG, config)


def _write_ends(folder: Path, tokenizer: Any) -> None:
    """Have answers end where those of the adapter do: at the tokenizer's end, too."""
    file = folder / _GENERATION
    settings = read_config(file) if file.is_file() else _generation_settings(folder)
    own = settings.get("eos_token_id")
    own = own if isinstance(own, list) else [own]
    ends = sorted({token for token in (tokenizer.eos_token_id, *own) if token is not None})
    if ends and ends != sorted(token for token in own if token is not None):
        write_json(file, settings | {"eos_token_id": ends if len(ends) > 1 else ends[0]})


def _generation_settings(folder: Path) -> dict[str, Any]:
    """What a model generates by that has no generation_config.json: as transformers does, from all that config.json says."""
    from transformers import GenerationConfig

    settings = GenerationConfig.from_pretrained(folder, config_file_name=_CONFIG, _from_model_config=True).to_diff_dict()
    settings.pop("_from_model_config", None)  # which it is no more
    return settings


def _write_index(plan: Plan, folder: Path) -> None:
    index = read_config(plan.checkpoint.folder / INDEX_FILE)
    metadata = dict(index.get("metadata") or {})
    if "total_size" in metadata:
        metadata["total_size"] = sum(plan.bytes_of(file) for file in plan.files)
    weight_map = index["weight_map"] | {out.name: file for file, outs in plan.files.items() for out in outs}
    changed = index | {"metadata": metadata, "weight_map": weight_map}
    if changed == index:
        shutil.copyfile(plan.checkpoint.folder / INDEX_FILE, folder / INDEX_FILE)
    else:
        write_json(folder / INDEX_FILE, changed)
