"""`bonetune convert`: an adapter in another format, checked against the one that it was made of."""

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bonetune.certificates import ROUNDING, TRUNCATION, prompts_of, same_tensors, same_updates, witness
from bonetune.certificates import certify as compare_answers
from bonetune.conversion.model import convert_model
from bonetune.conversion.report import Conversion, Written, copy_beside, notes_of, remedy, write_reports
from bonetune.conversion.staging import Rejected, is_ours, staged_for
from bonetune.errors import InputError
from bonetune.files import usable_folder
from bonetune.formats import (
    TARGETS,
    AdapterState,
    Fitted,
    bone,
    fit,
    gguf_lora,
    gguf_model,
    gguf_reading,
    lora,
    miss,
    read_adapter,
    rwkv,
)
from bonetune.models import check_trust, load_model, parse_dtype

# Formats that hold the trainable tensors as they are: reading one back gives the adapter itself.
_SAME_TENSORS: dict[str, Callable[[AdapterState, Path], None]] = {
    bone.NAME: bone.write,
    miss.NAME: miss.write,
    rwkv.NAME: rwkv.write,
}
_FOLDERS = (bone.NAME, miss.NAME, lora.NAME)


def convert(
    src: str,
    dst: str,
    *,
    to: str,
    read_as: str | None = None,
    base: str | None = None,
    variant: str | None = None,
    rank: int | None = None,
    dtype: str = "auto",
    certify: str = "auto",
    tolerance: float | None = None,
    pre_tokenizer: str | None = None,
    any_base: bool = False,
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> Conversion:
    """Write an adapter in another format, with its certificate and a report of what was mapped.

    Bone and mini become LoRA exactly. The BAT variants become LoRA by truncated singular values, which costs what the
    certificate says: more than `tolerance`, and nothing is written. docs/formats.md describes every format.

    Args:
        src: folder or file of the adapter; for gguf, of a whole model.
        dst: folder (peft-bone, miss, lora) or file (rwkv-disha, gguf-lora, gguf) to write.
        to: one of `bonetune.formats.TARGETS`.
        read_as: the format of `src`, one of `bonetune.formats.READERS`; None: as its files prove it.
        base: the base model, if it is not where the adapter says. LoRA formats need it, its weights only for BAT variants.
        variant: of files that do not say it.
        rank: of the LoRA of a BAT variant; None: r.
        dtype: of the tensors written: float32, bfloat16, float16, or `auto`, as they are.
        certify: `tensors` (read back, they are the adapter's very tensors), `layers` (each layer's update on random inputs),
            `logits` (the adapted models' answers to prompts), or `auto`: tensors where the format keeps them, else layers.
        tolerance: the largest error that is accepted, as a share of the update (`layers`) or of the logits (`logits`); None:
            what rounding explains, and 0.1 where singular values are cut.
        pre_tokenizer: gguf: llama.cpp's name of how the model's tokenizer cuts texts; None: it is recognised.
        any_base: compute a BAT variant's LoRA on another base model than it was trained on.
        trust_remote_code: run code that comes with the base model or the adapter.
        overwrite: replace what lies at `dst`.

    Raises:
        InputError: formats that are unknown or cannot hold the adapter, a base model that is missing or another one.
        AdapterFileError: an adapter that is torn, hostile, or does not fit the base model.
        RunError: the certificate does not hold. What was written is kept aside, at `dst` with `.rejected` added, or
            where the message says; or the disk is full.

    Example:
        >>> bonetune.convert("runs/first", "first-lora", to="lora").certificate.holds
    """
    source, target = Path(src), Path(dst)
    if to not in TARGETS:
        raise InputError(f"Unknown format {to!r} to convert to: choose one of {', '.join(TARGETS)}.")
    _check_target(source, target, overwrite)
    if to == gguf_model.NAME:
        of_adapters = {"read_as": read_as, "base": base, "variant": variant, "rank": rank, "tolerance": tolerance}
        _refuse(of_adapters | {"certify": None if certify == "auto" else certify}, "of adapters, not for gguf")
        return convert_model(src, target, dtype, pre_tokenizer, overwrite=overwrite)
    _refuse({"pre_tokenizer": pre_tokenizer}, "for gguf")
    _check_settings(to, rank, certify, tolerance, dtype)
    state = read_adapter(source, read_as, variant)
    if rank is not None and not state.config.spec().blockwise:
        raise InputError(
            f"rank is for the BAT variants: the LoRA of a {state.config.variant} adapter has its own r. Leave it out."
        )
    if base is not None:
        state = replace(state, config=replace(state.config, base_model_name_or_path=base))
    if isinstance(wanted := parse_dtype(dtype), torch.dtype):
        state = _cast(state, wanted)
    fitted = _fitted(state, to, certify, base, any_base=any_base, trusted=trust_remote_code)
    with staged_for(target, overwrite=overwrite) as staged:
        layers, certificate = _write(state, fitted, staged, _Wanted(to, rank, certify, tolerance, trust_remote_code))
        conversion = Conversion(
            source=str(source),
            output=str(target),
            read_as=state.source.format,
            written_as=to,
            certificate=certificate,
            notes=notes_of(state, layers),
            base=fitted.base if fitted else None,
            variant=state.config.variant,
            layers=layers,
            whole=tuple(state.whole),
        )
        if to in _FOLDERS:
            copy_beside(source, staged)
        write_reports(conversion, staged, made_of=state.source.files, base_fingerprint=_fingerprint(state, fitted))
        if not certificate.holds:
            raise Rejected("the adapter", f"{certificate}. {remedy(layers, certificate)}")
    return conversion


class _Wanted(NamedTuple):
    to: str
    rank: int | None
    certify: str
    tolerance: float | None
    trusted: bool


def _write(state: AdapterState, fitted: Fitted | None, staged: Path, wanted: _Wanted) -> tuple[dict[str, Written], Any]:
    """Write the artifact, read it back, and compare."""
    layers = {name: Written(tuple(tensor.shape), state.spec(name).r) for name, tensor in state.tensors.items()}
    if wanted.to in _SAME_TENSORS:
        _SAME_TENSORS[wanted.to](state, staged)
        if wanted.certify in ("auto", "tensors"):
            return layers, same_tensors(state, read_adapter(staged, wanted.to, state.config.variant))
    assert fitted is not None
    if wanted.to not in _SAME_TENSORS:
        of_lora = wanted.to == lora.NAME
        made = (
            lora.write(fitted, staged, wanted.rank)
            if of_lora
            else gguf_lora.write(fitted, staged, wanted.rank, _numbers(state))
        )
        for name, factors in made.items():
            costs = {"error": factors.error, "error_by_rank": factors.error_by_rank}
            layers[name] = replace(layers[name], rank=factors.rank, **costs)
    if wanted.certify == "logits":
        return layers, _same_answers(state, fitted, staged, wanted)
    allowed = _tolerance(state, layers) if wanted.tolerance is None else wanted.tolerance
    lost = {name: written.error for name, written in layers.items()}
    return layers, same_updates(fitted, *_read_back(fitted, staged, wanted.to), allowed, lost)


def _fitted(state: AdapterState, to: str, certify: str, base: str | None, *, any_base: bool, trusted: bool) -> Fitted | None:
    """The adapter on its base model, where that is needed or given, or is here and tells what the file does not."""
    known = state.config.base_model_name_or_path
    # MiSS adapts Linear layers alone, and the tensors of others look like theirs
    helps = to == miss.NAME and known is not None and Path(known).is_dir()
    if not (to in (lora.NAME, gguf_lora.NAME) or certify in ("layers", "logits") or base is not None or helps):
        return None
    check_trust(Path(state.source.path), trusted)
    fitted = fit(state, base, trust_remote_code=trusted)
    blockwise = state.config.spec().blockwise
    noted = state.source.base_fingerprint
    if blockwise and to not in _SAME_TENSORS and noted and not any_base and noted != fitted.checkpoint.fingerprint:
        raise InputError(
            f"{state.source.path} was trained on a base model with the fingerprint {noted[:12]}, and {fitted.base} has "
            f"{fitted.checkpoint.fingerprint[:12]}: pass --base MODEL, or --any-base to convert it for another model."
        )
    if to == miss.NAME:
        miss.check_layers(fitted)
    return fitted


def _cast(state: AdapterState, dtype: torch.dtype) -> AdapterState:
    """The adapter in another dtype; `InputError` if that loses more than its rounding."""
    cast = {name: tensor.to(dtype) for name, tensor in state.tensors.items()}
    off = sum(float((cast[name].double() - tensor.double()).square().sum()) for name, tensor in state.tensors.items())
    size = sum(float(tensor.double().square().sum()) for tensor in state.tensors.values())
    error, short = (off / size) ** 0.5 if size else 0.0, str(dtype).removeprefix("torch.")
    if not error <= ROUNDING[dtype]:
        raise InputError(
            f"dtype {short} does not hold the tensors of {state.source.path}: they would change by {error:.2g} of their size."
        )
    note = f"the adapter's tensors were rounded to {short}, by {error:.2g} of their size"
    return replace(state, tensors=cast).with_notes(*([note] if off else []))


def _numbers(state: AdapterState) -> str:
    """What a LoRA-GGUF file is written in: float16 if the adapter is, which bfloat16 would not fit in, else float32."""
    return "float16" if {tensor.dtype for tensor in state.tensors.values()} == {torch.float16} else "float32"


def _read_back(fitted: Fitted, written: Path, to: str) -> tuple[Callable[[str, Tensor], Tensor], Mapping[str, Tensor]]:
    """(layer, x) to x Delta^T of what was written, in float64, and its whole tensors."""
    if to in _SAME_TENSORS:
        again = replace(fitted, state=read_adapter(written, to, fitted.state.config.variant))
        return lambda layer, x: x @ again.delta(layer).double().mT, again.state.whole
    factors, whole = lora.read_factors(written) if to == lora.NAME else (gguf_reading.read_factors(written, fitted), {})
    return lambda layer, x: x @ factors[layer].A.double().T @ factors[layer].B.double().T, whole


def _tolerance(state: AdapterState, layers: Mapping[str, Written]) -> float:
    """Bone and mini, whose A is exact, lose nothing in any dtype."""
    if any(written.error_by_rank for written in layers.values()):
        return max(TRUNCATION, *(ROUNDING[tensor.dtype] for tensor in state.tensors.values()))
    return ROUNDING[torch.float32]


def _same_answers(state: AdapterState, fitted: Fitted, written: Path, wanted: _Wanted) -> Any:
    """Compare the adapted models' answers, one model in memory at a time."""
    options: dict[str, Any] = {"base": fitted.base, "trust_remote_code": wanted.trusted}
    with tempfile.TemporaryDirectory(dir=written.parent) as folder:
        ours = Path(folder) / "adapter"
        bone.write(state, ours)
        copy_beside(Path(state.source.path), ours)
        copy_beside(Path(state.source.path), written)
        loaded = load_model(str(ours), **options)
        expected = witness(loaded.model, loaded.tokenizer, prompts_of(ours))
        del loaded
    return compare_answers(load_model(str(written), **options).model, expected, wanted.tolerance)


def _refuse(settings: Mapping[str, Any], what_for: str) -> None:
    for name, value in settings.items():
        if value is not None:
            raise InputError(f"{name} is {what_for}: leave it out.")


def _check_settings(to: str, rank: int | None, certify: str, tolerance: float | None, dtype: str) -> None:
    if rank is not None and (rank < 1 or to not in (lora.NAME, gguf_lora.NAME)):
        raise InputError(f"rank is of a LoRA, and at least 1: got {rank} for {to}. Leave it out.")
    allowed = ("auto", "layers") + (("tensors",) if to in _SAME_TENSORS else ()) + (("logits",) if to in _FOLDERS else ())
    if certify not in allowed:
        raise InputError(f"certify={certify!r} is not possible for {to}: choose one of {', '.join(allowed)}.")
    if tolerance is not None and not (math.isfinite(tolerance) and tolerance >= 0):
        raise InputError(f"tolerance should be a number of at least 0, got {tolerance}.")
    if tolerance is not None and to in _SAME_TENSORS and certify in ("auto", "tensors"):
        raise InputError(f"tolerance is of layers or logits, and the tensors of {to} have to be equal: leave it out.")
    if to == gguf_lora.NAME and dtype not in ("auto", "float32", "float16"):
        raise InputError(f"gguf-lora is written in float32 or float16, not in {dtype}.")


def _check_target(source: Path, target: Path, overwrite: bool) -> None:
    here, there = source.resolve(), target.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise InputError(f"The destination {target} is the adapter {source} itself, or one lies in the other: choose another.")
    usable_folder(target.parent, "Destination")
    if target.exists() and not overwrite:
        raise InputError(f"Destination {target} already exists: pass --overwrite, or choose another.")
    if target.exists() and not is_ours(target):
        raise InputError(f"Destination {target} holds something else than a converted adapter: choose another.")


def _fingerprint(state: AdapterState, fitted: Fitted | None) -> str | None:
    """Of the base model, where its weights were read; else as the adapter says."""
    read = fitted is not None and "checkpoint" in vars(fitted)
    return fitted.checkpoint.fingerprint if fitted is not None and read else state.source.base_fingerprint
