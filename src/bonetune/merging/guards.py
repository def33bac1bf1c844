"""What a merge is asked for, and what it refuses before it begins."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bonetune.errors import AdapterFileError, InputError
from bonetune.files import CERTIFICATE_FILE, SUMMARY_FILE, read_config, usable_folder
from bonetune.formats.checkpoint import Checkpoint, local_folder
from bonetune.formats.peft_folder import trained_on
from bonetune.formats.pth_checkpoint import PthCheckpoint
from bonetune.formats.tensors import ADAPTER_CONFIG, ADAPTER_FILES, sha256
from bonetune.merging.memory import read_base_name
from bonetune.merging.staging import standing
from bonetune.models import check_trust, parse_dtype, task_type_of
from bonetune.rwkv.weights import is_pth
from bonetune.torch_files import map_tensors


class Options(NamedTuple):
    """What `merge` is called with, one scale for each adapter."""

    adapters: list[str]
    scales: list[float]
    output: Path
    base: str | None
    dtype: str
    into: str
    certify: str
    tolerance: float | None
    overwrite: bool
    trust_remote_code: bool

    @property
    def sources(self) -> list[Path]:
        """The folders of what is merged."""
        bases = [self.base, *map(_base_name, self.adapters)]
        return [*map(Path, self.adapters), *(Path(name) for name in bases if name and Path(name).is_dir())]


def checked_options(
    adapter: str | Sequence[str],
    output: str,
    base: str | None,
    dtype: str,
    scale: float | Sequence[float],
    into: str,
    certify: str,
    tolerance: float | None,
    overwrite: bool,
    trust_remote_code: bool,
) -> Options:
    """Raise `InputError` if one of the arguments cannot be used, or not with the others."""
    adapters = [adapter] if isinstance(adapter, str) else list(adapter)
    parse_dtype(dtype)
    if not adapters:
        raise InputError("There is no adapter to merge: name at least one.")
    for path in adapters:
        if not (base and is_pth(base)) and not (Path(path) / ADAPTER_CONFIG).is_file():
            file = " A file of RWKV-PEFT's needs --base FILE, the model's .pth." if is_pth(path) else ""
            raise InputError(f"{path} is not an adapter folder: it has no {ADAPTER_CONFIG}.{file}")
    if len({os.path.realpath(path) for path in adapters}) < len(adapters):
        raise InputError(f"An adapter is named twice: {', '.join(adapters)}. Use --scale to add it more than once.")
    scales = [float(scale)] * len(adapters) if isinstance(scale, int | float) else [float(one) for one in scale]
    if len(scales) == 1:
        scales *= len(adapters)
    if len(scales) != len(adapters):
        raise InputError(f"There are {len(scales)} scales for {len(adapters)} adapters: pass one for all, or one for each.")
    for one in scales:
        if not math.isfinite(one):
            raise InputError(f"scale should be a finite number, got {one}.")
    if into not in ("trained", "original"):
        raise InputError(f"into should be trained or original, got {into!r}.")
    if certify not in ("auto", "logits", "layers"):
        raise InputError(f"certify should be auto, logits or layers, got {certify!r}.")
    if tolerance is not None and not (math.isfinite(tolerance) and tolerance > 0):
        raise InputError(f"tolerance should be a number above 0, got {tolerance}.")
    if not (base and is_pth(base)):
        for path in adapters:
            check_trust(Path(path), trust_remote_code)
        tasks = {path: task_type_of(path) for path in adapters} if len(adapters) > 1 else {}
        if len({*tasks.values()}) > 1:
            told = ", ".join(f"{path} for {task}" for path, task in tasks.items())
            raise InputError(f"The adapters are for different tasks, {told}: merge those of one task.")
    return Options(adapters, scales, Path(output), base, dtype, into, certify, tolerance, overwrite, trust_remote_code)


def check_output(options: Options) -> None:
    """Raise `InputError` if the merged model cannot become the output folder, or would replace what it must not."""
    folder = options.output
    usable_folder(folder, "Output")
    place = Path(os.path.realpath(folder))
    if os.path.ismount(place):
        raise InputError(f"Output {folder} is a mount point, which no folder can be renamed to: choose a folder inside it.")
    for source in map(os.path.realpath, options.sources):
        if place == Path(source) or place in Path(source).parents or Path(source) in place.parents:
            raise InputError(f"Output {folder} is, holds or lies in what is merged, {source}: choose another.")
    held = standing(folder)
    if held is None:
        return
    if not options.overwrite:
        aside = "" if held == place else f" (as {held}, since its replacement was killed)"
        raise InputError(f"Output {folder} already exists{aside}: pass --overwrite, or choose another.")
    # an adapter that was merged has its certificate, too
    if not (held / CERTIFICATE_FILE).is_file() or (held / ADAPTER_CONFIG).is_file():
        raise InputError(f"Output {folder} holds something else than a merged model of bonetune's: choose another.")


def _base_name(adapter: str) -> str | None:
    try:
        return read_base_name(adapter)
    except (ValueError, AttributeError):  # what is wrong with it is said by whoever reads the adapter
        return None


def base_of(options: Options) -> tuple[str | None, Checkpoint | None]:
    """The name of the one base model of all adapters, and its files if they are safetensors."""
    names = {options.base} if options.base else {_base_name(path) for path in options.adapters}
    if len(names) > 1:
        raise InputError(f"The adapters name different base models, {', '.join(map(str, names))}: pass --base MODEL.")
    (name,) = names
    try:
        return name, Checkpoint(local_folder(name)) if name else None
    except InputError:
        if name and Path(name).is_dir() and any(Path(name).glob("*.safetensors*")):
            raise
        return name, None


def check_base(adapters: Sequence[str], checkpoint: Checkpoint) -> None:
    """Raise if the base model is another than was trained on, or has one of the adapters in it."""
    certificate = checkpoint.folder / CERTIFICATE_FILE
    merged = read_config(certificate).get("adapters") if certificate.is_file() else None
    there = {digest for one in merged or [] if isinstance(one, dict) for name, digest in one.items() if name in ADAPTER_FILES}
    for adapter in map(Path, adapters):
        if there & set(hashes_of(adapter).values()):
            raise InputError(
                f"Base model {checkpoint.folder} was made by merging {adapter} already: pass the model from before as --base, "
                "or, to merge it a second time, --any-base."
            )
        known = trained_on(adapter)
        if known is not None and known != checkpoint.fingerprint:
            summary = read_config(adapter / SUMMARY_FILE) if (adapter / SUMMARY_FILE).is_file() else {}
            raise InputError(
                f"{adapter} was trained on {summary.get('base', 'a base model')} with the fingerprint {known[:12]}, and "
                f"{checkpoint.folder} has {checkpoint.fingerprint[:12]}: pass --base MODEL, or, to merge into another model "
                "deliberately, --any-base."
            )


def hashes_of(adapter: Path) -> dict[str, str]:
    """sha256 of an adapter's files, by name."""
    return {name: sha256(adapter / name) for name in (ADAPTER_CONFIG, *ADAPTER_FILES) if (adapter / name).is_file()}


def pth_of(adapters: Sequence[str]) -> str | None:
    """The RWKV file that all of the adapters name as their base model, if it is one."""
    named = [_base_name(path) if (Path(path) / ADAPTER_CONFIG).is_file() else None for path in adapters]
    same = len({os.path.realpath(name) if name else None for name in named}) == 1
    return named[0] if same and named[0] is not None and is_pth(named[0]) else None


def check_replaced(output: Path) -> None:
    """Raise `InputError` if what a merge is to replace is no model in an RWKV file."""
    try:
        names = map_tensors(output) if output.exists() else {"emb.weight": None}
    except AdapterFileError:
        names = {}
    if "emb.weight" not in names:
        raise InputError(f"Output {output} holds something else than an RWKV model: choose another.")


def check_pth(adapters: Sequence[str], checkpoint: PthCheckpoint) -> None:
    """Raise `InputError` if an RWKV file is another than an adapter was trained on."""
    for adapter in map(Path, adapters):
        known = trained_on(adapter)
        if known is not None and known != checkpoint.fingerprint:
            raise InputError(
                f"{adapter} was trained on a base model with the fingerprint {known[:12]}, and {checkpoint.path} has "
                f"{checkpoint.fingerprint[:12]}: pass --base FILE, or, to merge into another model deliberately, --any-base."
            )
