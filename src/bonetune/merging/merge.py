"""`bonetune merge`: an adapter and its base model become one model, which is loaded back and compared before it counts."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bonetune.errors import InputError
from bonetune.files import folder_written_beside, write_json
from bonetune.merging.certify import Certificate, certify, witness
from bonetune.models import load_base, load_model, parse_dtype
from bonetune.tuner import BoneLayer

CERTIFICATE_FILE = "certificate.json"
# For adapters that come without prompts of their own.
_PROMPTS = (
    "The capital of France is",
    "Question: What is 12 plus 30?\nAnswer:",
    "def fibonacci(n):\n",
    "Once upon a time, in a small village by the sea,",
    "The three primary colours are",
    "Water boils at",
)


@dataclass(frozen=True)
class MergeResult:
    """Where the merged model lies, and how it compares with the adapted one."""

    output: str
    certificate: Certificate


def merge(
    adapter: str,
    output: str,
    *,
    base: str | None = None,
    dtype: str = "auto",
    scale: float = 1.0,
    overwrite: bool = False,
) -> MergeResult:
    """Merge an adapter into its base model and write the result, with its certificate, to a folder.

    The merged weights are added in float32 from the base's, rounded once, written, loaded again from disk and compared
    with the adapted model on the adapter's own training prompts (prompts.jsonl beside it; else on general ones). The
    folder appears only when all this is done.

    Args:
        adapter: folder of the adapter.
        output: folder to write.
        base: base model, if it is not where the adapter says.
        dtype: of the merged weights; `auto` keeps the base's.
        scale: factor of the update; 1 is what was trained.
        overwrite: replace what `output` holds.

    Raises:
        InputError: adapter or base model that cannot be loaded, output that exists, scale of a method without scaling.
        AdapterFileError: tensors that do not fit the base model.
    """
    parse_dtype(dtype)
    folder = Path(output)
    if not (Path(adapter) / "adapter_config.json").is_file():
        raise InputError(f"{adapter} is not an adapter folder: it has no adapter_config.json.")
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not overwrite)):
        raise InputError(f"Output {output} already exists: pass --overwrite, or choose another.")
    loaded = load_model(adapter, dtype, base)
    _scale(loaded.model, scale)
    expected = witness(loaded.model, loaded.tokenizer, _prompts_of(Path(adapter)))
    merged = loaded.model.merge_and_unload(safe_merge=True)
    with folder_written_beside(folder) as beside:
        merged.save_pretrained(beside)
        loaded.tokenizer.save_pretrained(beside)
        del merged, loaded
        certificate = certify(load_base(str(beside)).model, expected)
        write_json(beside / CERTIFICATE_FILE, certificate.to_dict())
    return MergeResult(output, certificate)


def _scale(model: Any, scale: float) -> None:
    if scale == 1:
        return
    layers = [module for module in model.modules() if isinstance(module, BoneLayer)]
    if not layers:
        raise InputError("--scale needs an adapter of the Bone family, and this one is of another method.")
    for layer in layers:
        layer.scale_layer(scale)


def _prompts_of(adapter: Path) -> list[str]:
    file = adapter / "prompts.jsonl"
    if not file.is_file():
        return list(_PROMPTS)
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
