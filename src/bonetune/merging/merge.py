"""`bonetune merge`: an adapter and its base model become one model, which is loaded back and compared before it counts."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bonetune.errors import AdapterFileError, InputError, RunError
from bonetune.files import PROMPTS_FILE, folder_written_beside, read_json_lines, usable_folder, write_json
from bonetune.merging.certify import Certificate, certify, witness
from bonetune.models import end_tokens, load_base, load_model, parse_dtype
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

    The update is added in float32 and rounded once; the model is written, loaded again from disk and compared with the
    adapted one on the adapter's own training prompts (prompts.jsonl beside it; else on general ones). The folder appears
    only if they agree.

    Args:
        adapter: folder of the adapter.
        output: folder to write.
        base: base model, if it is not where the adapter says.
        dtype: of the merged weights; `auto` keeps the base's.
        scale: factor of the update; 1 is what was trained.
        overwrite: replace the merged model that `output` holds.

    Raises:
        InputError: adapter or base model that cannot be loaded, output that exists, scale of a method without scaling.
        AdapterFileError: tensors that do not fit the base model, or are not finite.
        RunError: the merged model does not say what the adapted one says.

    Example:
        >>> bonetune.merge("runs/first", "merged").certificate.holds
    """
    target = parse_dtype(dtype)
    folder = Path(output)
    if not (Path(adapter) / "adapter_config.json").is_file():
        raise InputError(f"{adapter} is not an adapter folder: it has no adapter_config.json.")
    if not math.isfinite(scale):
        raise InputError(f"scale should be a finite number, got {scale}.")
    _check_output(folder, overwrite)
    # the trained model: in the base's own dtype, or wider where a wider result is asked for
    loaded = load_model(adapter, "float32" if dtype == "float32" else "auto", base)
    _check_finite(loaded.model, adapter)
    _scale(loaded.model, scale)
    expected = witness(loaded.model, loaded.tokenizer, _prompts_of(Path(adapter)))
    ends = end_tokens(loaded.model, loaded.tokenizer)
    merged = loaded.model.merge_and_unload()
    merged.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    if target != "auto":
        merged = merged.to(target)
    with folder_written_beside(folder, replace=True) as beside:
        merged.save_pretrained(beside)
        loaded.tokenizer.save_pretrained(beside)
        del merged, loaded
        certificate = certify(load_base(str(beside)).model, expected)
        if not certificate.holds:
            raise RunError(f"The merged model is not the adapted one, so {output} was not written. It is {certificate}.")
        write_json(beside / CERTIFICATE_FILE, certificate.to_dict())
    return MergeResult(output, certificate)


def _check_output(folder: Path, overwrite: bool) -> None:
    usable_folder(folder, "Output")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise InputError(f"Output {folder} already exists: pass --overwrite, or choose another.")
    if not (folder / CERTIFICATE_FILE).is_file():
        raise InputError(f"Output {folder} holds something else than a merged model of bonetune's: choose another.")


def _check_finite(model: Any, adapter: str) -> None:
    bad = [name for name, p in model.named_parameters() if "bone_block" in name and not p.isfinite().all()]
    if bad:
        raise AdapterFileError(f"Adapter {adapter} holds values that are not finite, in {len(bad)} tensors: {bad[0]}, ...")


def _scale(model: Any, scale: float) -> None:
    if scale == 1:
        return
    layers = [module for module in model.modules() if isinstance(module, BoneLayer)]
    if not layers:
        raise InputError("--scale needs an adapter of the Bone family, and this one is of another method.")
    for layer in layers:
        layer.scale_layer(scale)


def _prompts_of(adapter: Path) -> list[str]:
    file = adapter / PROMPTS_FILE
    if not file.is_file():
        return list(_PROMPTS)
    try:
        prompts = read_json_lines(file)
    except ValueError as error:
        raise InputError(f"{file} does not hold a text in quotes on each line: {error}.") from error
    return [prompt for prompt in prompts if isinstance(prompt, str) and prompt.strip()] or list(_PROMPTS)
