"""Nothing half-written: files and folders are made beside their place and renamed into it when they are whole."""

import errno
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bonetune.errors import AdapterFileError, InputError, first_line

# What a training run leaves beside its adapter and others read: its settings, some prompts for a merge, what it was in numbers.
RUN_FILE, PROMPTS_FILE, SUMMARY_FILE = "run.yaml", "prompts.jsonl", "summary.json"
# What a merge leaves beside the adapter and the merged model.
CERTIFICATE_FILE = "certificate.json"
# What a conversion reports beside the adapter that it wrote.
CONVERSION_FILE = "conversion.json"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def folder_written_beside(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder near `path`; when the block ends well, it becomes `path`.

    If `path` exists, the new files are staged inside it (it may be a mount point) and moved up one by one, configurations
    last, replacing namesakes; other files stay. With `replace`, the whole old folder gives way to the new one. If the
    block raises, `path` is as it was.
    """
    into = path.exists() and not replace
    place = path if into else path.parent
    place.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=place))
    try:
        yield beside
        beside.chmod(0o755)  # mkdtemp's are private
        if into:
            for item in sorted(beside.iterdir(), key=lambda item: (item.suffix == ".json", item.name)):
                if (path / item.name).is_dir():
                    shutil.rmtree(path / item.name)
                item.replace(path / item.name)
        else:
            old = beside.with_name(beside.name + "-old")
            if path.exists():
                path.rename(old)
            beside.rename(path)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def file_written_beside(path: Path) -> Iterator[Path]:
    """Yield a name near `path` to write a file to; when the block ends well, it is flushed to the disk and becomes `path`.

    If the block raises, `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def cache_folder() -> Path:
    """Where what can be made again is kept: $XDG_CACHE_HOME/bonetune."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bonetune"


def usable_folder(path: Path, name: str) -> None:
    """Raise `InputError` if `path` is no folder and cannot become one. `name` is the setting's, for the message."""
    for part in (path, *path.parents):
        if part.is_dir():
            if not os.access(part, os.W_OK):
                raise InputError(f"{name} {path} cannot be written: no permission in {part}.")
            return
        if part.exists():
            raise InputError(f"{name} {path} cannot be a folder: {part} is a file.")


def no_room(error: Exception) -> str | None:
    """What the error of a full disk, or of a file that cannot grow so large, says; None: it is another error."""
    in_words = re.search(r"\(os error (\d+)\)", str(error))  # of safetensors, whose errors have no number
    found = [cause.errno for cause in (error, error.__context__) if isinstance(cause, OSError)]  # torch's wrap it
    number = found[0] if found else int(in_words[1]) if in_words else None
    return os.strerror(number) if number in _NO_ROOM else None


def size_in_words(number: int) -> str:
    """A number of bytes in MiB or GiB."""
    return f"{number / 2**30:.2f} GiB" if number >= 2**27 else f"{number / 2**20:.1f} MiB"


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
    write_text(path, json_text(content, indent=2) + "\n")


def write_json_lines(path: Path, rows: list[Any]) -> None:
    """Write one JSON value a line to `path`, in one step."""
    write_text(path, "".join(json_text(row) + "\n" for row in rows))


def json_text(content: Any, indent: int | None = None) -> str:
    """JSON that UTF-8 can hold: halves of surrogate pairs, as a model's text may have, are escaped, all else is readable.

    Numbers that JSON does not have (NaN, infinity) are null.
    """
    text = json.dumps(_finite(content), indent=indent, ensure_ascii=False, allow_nan=False)
    return re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", text)


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def read_json_lines(path: Path) -> list[Any]:
    """The values of a file of JSON lines; a line torn at the end of the file, as a killed writer leaves it, is left out."""
    values = []
    # not splitlines: a text in JSON may hold other characters that Unicode counts as ends of lines
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            values.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines) - 1:
                raise
    return values


def read_config(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        AdapterFileError: it does not.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} is not a JSON file: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise AdapterFileError(f"{path} should hold a JSON object, not a {type(content).__name__}.")
    return content


def read_run(folder: Path) -> dict[str, Any]:
    """The settings of the run that made an adapter, from the run.yaml beside it; none if there is no such file.

    Raises:
        AdapterFileError: the file holds no settings.
    """
    import yaml

    file = folder / RUN_FILE
    if not file.is_file():
        return {}
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise AdapterFileError(f"{file} is not a YAML file: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise AdapterFileError(f"{file} should hold settings by name, not a {type(content).__name__}.")
    return content
