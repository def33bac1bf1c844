"""`bonetune merge`: an adapter and its base model become one model, which is loaded back and compared before it counts."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bonetune.data.formats import TaskName
from bonetune.errors import AdapterFileError, InputError, RunError
from bonetune.files import (
    CERTIFICATE_FILE,
    PROMPTS_FILE,
    folder_written_beside,
    read_json_lines,
    read_run,
    usable_folder,
    write_json,
)
from bonetune.merging.certify import TOLERANCE, Certificate, Witness, certify, witness
from bonetune.models import Loaded, end_tokens, load_base, load_model, parse_dtype
from bonetune.tuner import BoneLayer
from bonetune.tuner.dequantize import dequantize_layers, forget_quantization

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
    """Where the merged model lies, and how it compares.

    Args:
        output: its folder.
        certificate: with the adapted model.
        into: `trained` or `original`, for an adapter that was trained on quantized weights; else None.
        other: what the other one of these two is, compared with the adapted model.
    """

    output: str
    certificate: Certificate
    into: str | None = None
    other: Certificate | None = None


def merge(
    adapter: str,
    output: str,
    *,
    base: str | None = None,
    dtype: str = "auto",
    scale: float = 1.0,
    into: str = "trained",
    overwrite: bool = False,
) -> MergeResult:
    """Merge an adapter into its base model and write the result, with its certificate, to a folder.

    The update is added in float32 and rounded once; the model is written, loaded again from disk and compared with the
    adapted one on the adapter's own training prompts (prompts.jsonl beside it; else on general ones). The folder appears
    only if they agree. The certificate is left beside the adapter, too.

    Args:
        adapter: folder of the adapter.
        output: folder to write.
        base: base model, if it is not where the adapter says.
        dtype: of the merged weights; `auto` keeps the base's.
        scale: factor of the update; 1 is what was trained.
        into: for an adapter trained on quantized weights: `trained` merges into the values that those stood for, so that the
            merged model is the one that was trained; `original` into the weights from before they were quantized, to which
            the adapter was never fitted. The result tells how far the other one is from the trained model.
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
    if into not in ("trained", "original"):
        raise InputError(f"into should be trained or original, got {into!r}.")
    _check_output(folder, overwrite)
    prompts = _prompts_of(Path(adapter))
    quantized = read_run(Path(adapter)).get("quantization") is not None
    # the trained model: in the base's own dtype, or wider where a wider result is asked for
    options = {"dtype": "float32" if dtype == "float32" else "auto", "base": base, "prompts": prompts}
    loaded = _adapted(adapter, scale, quantized=quantized and into == "trained", **options)
    expected = witness(loaded.model, loaded.tokenizer, prompts)
    ends = end_tokens(loaded.model, loaded.tokenizer) if loaded.model.can_generate() else []
    merged = loaded.model.merge_and_unload(**({"dequantize": True} if quantized and into == "trained" else {}))
    if ends:
        merged.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    if target != "auto":
        merged = merged.to(target)
    other = None
    with folder_written_beside(folder, replace=True) as beside:
        merged.save_pretrained(beside)
        loaded.tokenizer.save_pretrained(beside)
        task_type, trusted = loaded.task_type, read_run(Path(adapter)).get("trust_remote_code", False)
        del merged, loaded
        certificate = certify(load_base(str(beside), task_type=task_type, trust_remote_code=trusted).model, expected)
        if not certificate.holds:
            raise RunError(f"The merged model is not the adapted one, so {output} was not written. It is {certificate}.")
        if quantized:
            other = _other_choice(adapter, scale, into, str(beside), task_type, expected, options)
        write_json(beside / CERTIFICATE_FILE, certificate.to_dict())
    if os.access(adapter, os.W_OK):
        write_json(Path(adapter) / CERTIFICATE_FILE, certificate.to_dict())
    return MergeResult(output, certificate, into if quantized else None, other)


def _adapted(adapter: str, scale: float, *, quantized: bool, dtype: str, base: str | None, prompts: list[str]) -> Loaded:
    """The trained model; over quantized weights, with the values that they stand for, and products that are not rounded."""
    loaded = load_model(adapter, "auto" if quantized else dtype, base, quantized=quantized)
    _check_finite(loaded.model, adapter)
    _scale(loaded.model, scale)
    if quantized:
        said = witness(loaded.model, loaded.tokenizer, prompts)
        plain = dequantize_layers(loaded.model)
        forget_quantization(loaded.model)
        wide = dtype == "float32" or len({layer.weight.dtype for layer in plain} | {loaded.model.dtype}) > 1
        if wide:  # backends that dequantize to float32 leave the rest as it was
            loaded.model.float()
        difference = certify(loaded.model, said)
        if not difference.error <= TOLERANCE["bfloat16"] * difference.size:  # products with codes are no more exact than that
            raise RunError(
                f"The values read from the quantized weights are not those that {adapter} was trained on. {difference}."
            )
    return loaded


def _other_choice(
    adapter: str,
    scale: float,
    into: str,
    merged: str,
    task_type: TaskName,
    expected: Witness,
    options: dict[str, Any],
) -> Certificate:
    """How the model over the original weights compares with the trained one, whichever of them was merged."""
    if into == "trained":
        return certify(_adapted(adapter, scale, quantized=False, **options).model, expected)
    trained = _adapted(adapter, scale, quantized=True, **options)
    return certify(load_base(merged, task_type=task_type).model, witness(trained.model, trained.tokenizer, options["prompts"]))


def _check_output(folder: Path, overwrite: bool) -> None:
    usable_folder(folder, "Output")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise InputError(f"Output {folder} already exists: pass --overwrite, or choose another.")
    # an adapter that was merged has its certificate, too
    if not (folder / CERTIFICATE_FILE).is_file() or (folder / "adapter_config.json").is_file():
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
