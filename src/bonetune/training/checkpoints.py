"""Checkpoints that are whole or not there: staged beside, checksummed, renamed; the last good one is found by reading it."""

import hashlib
import json
import os
import shutil
from pathlib import Path

from bonetune.errors import RunError
from bonetune.files import write_json

MANIFEST_FILE, PREFIX = "checksums.json", "checkpoint-"
# What a checkpoint says of the data it was trained on.
DATA_FILE = "data.json"


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix(PREFIX))


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints of a run's folder, good or not, the oldest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit() and path.is_dir()]
    return sorted(found, key=step_of)


def staging(folder: Path) -> Path:
    """Where a checkpoint is put together before it gets its name."""
    return folder / ".staged"


def publish(staged: Path, folder: Path) -> Path:
    """Give a finished checkpoint its place in the run's folder.

    Its files are flushed to the disk and their checksums written before it is renamed, so that whatever bears a checkpoint's
    name was whole at that moment.
    """
    files = {str(path.relative_to(staged)): path for path in sorted(staged.rglob("*")) if path.is_file()}
    for path in files.values():
        _flush(path)
    sums = {name: {"sha256": _sha256(path), "bytes": path.stat().st_size} for name, path in files.items()}
    write_json(staged / MANIFEST_FILE, {"step": step_of(staged), "files": sums})
    _flush(staged / MANIFEST_FILE)
    place = folder / staged.name
    discard(place)
    staged.rename(place)
    _flush(folder)
    return place


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, after reading all of it; None if it is as it was written."""
    try:
        expected = json.loads((checkpoint / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"has no {MANIFEST_FILE}"
    except (ValueError, KeyError, OSError) as error:
        return f"has an unreadable {MANIFEST_FILE} ({error})"
    for name, facts in expected.items():
        path = checkpoint / name
        if not path.is_file():
            return f"lacks {name}"
        if path.stat().st_size != facts["bytes"]:
            return f"has {path.stat().st_size:,} bytes of {facts['bytes']:,} in {name}"
        if _sha256(path) != facts["sha256"]:
            return f"has other bytes in {name} than were written"
    return None


def last_good(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint, and a sentence about each newer one that is damaged."""
    passed_over = []
    for checkpoint in reversed(checkpoints(folder)):
        trouble = damage(checkpoint)
        if trouble is None:
            return checkpoint, passed_over
        passed_over.append(f"Checkpoint {checkpoint} {trouble}: passed over.")
    return None, passed_over


def rotate(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for checkpoint in checkpoints(folder)[:-keep]:
        discard(checkpoint)


def discard(path: Path) -> None:
    """Remove a checkpoint; while that goes on it has no checkpoint's name."""
    if path.exists():
        doomed = path.with_name(f".old-{path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed)


def sweep(folder: Path) -> None:
    """Remove what a killed process was writing or removing."""
    for leftover in (staging(folder), *folder.glob(f".old-{PREFIX}*")):
        shutil.rmtree(leftover, ignore_errors=True)


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raise `RunError` if the disk under `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RunError(
            f"The disk of {folder} has {free / 1e9:.2f} GB free and {what} needs {needed / 1e9:.2f}: make room, lower "
            "save_total_limit, or choose another output_dir."
        )


def size_of(checkpoint: Path) -> int:
    """Bytes of all its files."""
    return sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
