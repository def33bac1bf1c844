"""What a conversion says of itself: conversion.json, certificate.json, and what users of the result have to know."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from bonetune.certificates import Proof, UpdatesCertificate, hashes, record
from bonetune.files import CERTIFICATE_FILE, CONVERSION_FILE, PROMPTS_FILE, RUN_FILE, SUMMARY_FILE, read_run, write_json
from bonetune.formats import AdapterState
from bonetune.formats.tensors import sha256

# What lies beside an adapter and belongs to it in every format that is a folder.
_BESIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    PROMPTS_FILE,
    RUN_FILE,
    SUMMARY_FILE,
)


@dataclass(frozen=True)
class Written:
    """What became of one layer's update.

    Args:
        shape: of the trainable tensor that was read.
        r: shard size.
        rank: of the LoRA that was written, if it is one.
        error: what truncation lost, as a share of the update.
        error_by_rank: what truncation would cost at other ranks, as a share of the update; for the BAT variants alone.
    """

    shape: tuple[int, ...]
    r: int
    rank: int | None = None
    error: float = 0.0
    error_by_rank: Mapping[int, float] | None = None


@dataclass(frozen=True)
class Conversion:
    """What was converted, and how well.

    Args:
        source: what was read.
        output: the folder or file that was written.
        read_as: the format that was read.
        written_as: the format that was written.
        certificate: the proof.
        notes: what the reader decided, and what users of the result have to know.
        base: the adapter's base model, if it was asked for.
        variant: of an adapter.
        layers: what became of each layer's update, by the layer's name in the base model.
        whole: names of the tensors that went along whole.
    """

    source: str
    output: str
    read_as: str
    written_as: str
    certificate: Proof
    notes: tuple[str, ...] = ()
    base: str | None = None
    variant: str | None = None
    layers: Mapping[str, Written] = field(default_factory=dict)
    whole: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As conversion.json holds it."""
        return asdict(replace(self, certificate=cast(Any, None))) | {"certificate": self.certificate.to_dict()}


def notes_of(state: AdapterState, layers: Mapping[str, Written]) -> tuple[str, ...]:
    """What the reader decided, and what users of the result have to know."""
    notes = [*state.notes]
    quantization = read_run(Path(state.source.path)).get("quantization")
    if quantization and any(written.error_by_rank for written in layers.values()):
        notes.append(
            f"the adapter was trained on {quantization} weights, and this update was computed from the weights before that: "
            "it is not quite what was trained, which bonetune merge keeps"
        )
    if any(written.rank for written in layers.values()):
        rank = max(written.rank or 0 for written in layers.values())
        notes.append(f"the LoRA has rank {rank}: vLLM serves it with --max-lora-rank {_vllm_rank(rank)} or more")
        if state.whole:
            notes.append(f"{len(state.whole)} tensors that were trained whole go along; servers of LoRA refuse or ignore them")
    return tuple(notes)


def _vllm_rank(rank: int) -> int:
    """The smallest value of --max-lora-rank that vLLM takes for this rank."""
    return next((allowed for allowed in (1, 8, 16, 32, 64, 128, 256, 320, 512) if allowed >= rank), rank)


def write_reports(
    conversion: Conversion, staged: Path, *, made_of: Mapping[str, str] | None = None, base_fingerprint: str | None = None
) -> None:
    """conversion.json and certificate.json: in a folder that was written, or beside a file, with its name before theirs.

    Args:
        conversion: what they are of.
        staged: what was written, where it lies until it takes its place.
        made_of: sha256 of the files that were read, by their names.
        base_fingerprint: of the base model, or of the model itself (`Checkpoint.fingerprint`).
    """
    files = hashes(staged) if staged.is_dir() else {staged.name: sha256(staged)}
    adapters = [made_of] if made_of else []
    certificate = record(conversion.certificate, files, base_fingerprint=base_fingerprint, adapters=adapters)
    report = conversion.to_dict() | {"base_fingerprint": base_fingerprint, "certificate": certificate}
    for name, content in ((CONVERSION_FILE, report), (CERTIFICATE_FILE, certificate)):
        write_json(staged / name if staged.is_dir() else staged.with_name(f"{staged.name}.{name}"), content)


def copy_beside(source: Path, written: Path) -> None:
    """Copy what belongs to an adapter from its folder to another one."""
    for name in _BESIDE:
        if source.is_dir() and (source / name).is_file() and not (written / name).exists():
            shutil.copyfile(source / name, written / name)


def remedy(layers: Mapping[str, Written], certificate: Proof) -> str:
    """What to do about an error that is too large, if truncation is its cause."""
    curves = [written.error_by_rank for written in layers.values() if written.error_by_rank]
    if not curves or not isinstance(certificate, UpdatesCertificate):
        return ""
    most = certificate.tolerance
    enough = [min((rank for rank, error in curve.items() if error <= most), default=None) for curve in curves]
    known = [rank for rank in enough if rank is not None]
    rank = f"--rank {max(known)}" if len(known) == len(enough) else f"a --rank above {max(max(curve) for curve in curves)}"
    return f"Pass {rank} (error at most {most:.2g} in each layer), a larger --tolerance, or merge the adapter."
