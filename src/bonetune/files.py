"""Nothing half-written: files and folders are made beside their place and renamed into it when they are whole."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def folder_written_beside(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`; when the block ends well, its files move into `path`, replacing namesakes.

    If the block raises, `path` is as it was. `path` may hold other files; they stay.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield beside
        if not path.exists():
            beside.chmod(0o755)  # mkdtemp's are private
            beside.rename(path)
        else:
            for item in sorted(beside.iterdir()):
                if (path / item.name).is_dir():
                    shutil.rmtree(path / item.name)
                item.replace(path / item.name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write `content` to `path` as indented JSON, in one step."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_json_lines(path: Path, rows: list[Any]) -> None:
    """Write one JSON value a line to `path`, in one step."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
