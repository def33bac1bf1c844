"""Where a merged model grows: a folder beside its place, which a merge that was killed finds again."""

import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from bonetune.errors import InputError, RunError
from bonetune.files import CERTIFICATE_FILE, no_room, read_config, size_in_words, write_json
from bonetune.formats.tensors import ADAPTER_CONFIG, sha256

JOURNAL = "merging.json"


class Staging:
    """The folder `.NAME.merging` beside the output `NAME`, with a journal of what is finished in it.

    Args:
        output: the folder that it is to become; a link to a folder stays, and what it leads to is replaced.
        identity: what the merge is made from. What another merge left in the folder is removed.
        overwrite: replace what `output` holds.

    Raises:
        InputError: another process is at work in it, or has meanwhile written `output`, or something else has its name.
    """

    def __init__(self, output: Path, identity: dict[str, Any], *, overwrite: bool = False) -> None:
        self.output = Path(os.path.realpath(output))
        self.folder = self.output.with_name(f".{self.output.name}.merging")
        self.identity, self.needed = identity, 0
        if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
            raise InputError(f"{self.folder} is where {output} would be made, and is no folder: remove it.")
        self._lock, self._closed = -1, False
        # a folder that is locked just when another process has renamed or removed it is not the one of that name
        if not (self._take(output) or self._take(output)):
            raise InputError(f"Another process is merging into {output}: wait for it, or choose another output.")
        held = standing(self.output)
        if held is not None and not overwrite:
            self.remove()
            raise InputError(f"Output {output} was written meanwhile: pass --overwrite, or choose another.")
        if held is not None and held != self.output:
            if self.output.exists():
                self.output.rmdir()
            held.rename(self.output)
        self.finished: dict[str, dict[str, Any]] = self._read()

    def _take(self, output: Path) -> bool:
        self.folder.mkdir(parents=True, exist_ok=True)
        if os.name != "posix":
            return True
        import fcntl

        try:
            self._lock = os.open(self.folder, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(self._lock), self.folder.stat()):
                return True
        except FileNotFoundError:
            pass
        except OSError as error:
            self.close()
            raise InputError(f"Another process is merging into {output}: wait for it, or choose another output.") from error
        self._unlock()
        return False

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            journal = json.loads((self.folder / JOURNAL).read_text(encoding="utf-8"))
            files = dict(journal["files"]) if journal["identity"] == self.identity else {}
            whole = {name: entry for name, entry in files.items() if self._is(name, entry["sha256"], entry["size"])}
        except (OSError, ValueError, KeyError, TypeError):
            whole = {}
        for item in self.folder.iterdir():
            if item.name not in whole:
                shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink()
        return whole

    def _is(self, name: str, digest: str, size: int) -> bool:
        path = self.folder / Path(name).name
        return path.is_file() and path.stat().st_size == size and sha256(path) == digest

    def finish(self, name: str, digest: str) -> None:
        """Note that a file is whole and on the disk."""
        self.finished[name] = {"sha256": digest, "size": (self.folder / name).stat().st_size}
        write_json(self.folder / JOURNAL, {"identity": self.identity, "files": self.finished})

    def check_space(self, needed: int) -> None:
        """Raise `InputError` if the disk has not the room for what is unfinished of `needed` bytes."""
        self.needed = needed
        left = max(0, needed - sum(entry["size"] for entry in self.finished.values()))
        free = shutil.disk_usage(self.folder).free
        if free < left:
            if not self.finished:
                self.remove()
            needs, has = size_in_words(left), size_in_words(free)
            raise InputError(f"{self.output} needs {needs}, and its disk has {has} free: choose another output.")

    @contextmanager
    def saying_what_is_full(self) -> Iterator[None]:
        """Write within it: the error of a full disk becomes one that names what was needed and what is free.

        Raises:
            RunError: the disk is full, or files cannot grow so large; what is finished stays for another try. Of any other
                `RunError` nothing stays, for another try would end so, too.
        """
        try:
            yield
        except RunError:
            self.remove()
            raise
        except Exception as error:  # libraries in Rust have errors of their own for a full disk
            if (words := no_room(error)) is None:
                raise
            free = size_in_words(shutil.disk_usage(self.folder).free)
            stays = f" What is finished stays in {self.folder}; the same command goes on from there." if self.finished else ""
            if not self.finished:
                self.remove()
            raise RunError(
                f"{self.output} could not be written ({words}): {size_in_words(self.needed)} were needed, and the disk has "
                f"{free} free.{stays}"
            ) from error

    def publish(self) -> None:
        """Rename the folder to the output, in place of what is there."""
        _put(self.folder, self.output, _displaced(self.output))
        self.close()

    def reject(self, sources: Collection[Path] = ()) -> Path:
        """Keep the folder aside as `NAME.rejected`, in place of an older one, and return its path.

        Args:
            sources: folders that stay, whatever they hold. Beside them and what is no rejected merge, it is `NAME.rejected-2`
                and so on.
        """
        stay = {os.path.realpath(source) for source in sources}
        names = (f"{self.output.name}.rejected{'' if number == 1 else f'-{number}'}" for number in count(1))
        places = (self.output.with_name(name) for name in names)
        aside = next(place for place in places if not os.path.lexists(place) or _gives_way(place, stay))
        _put(self.folder, aside, aside.with_name(f".{aside.name}-old"))
        self.close()
        return aside

    def remove(self) -> None:
        """Nothing in it is of use. Once it is closed, the folder of that name is another's."""
        if not self._closed:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.close()

    def close(self) -> None:
        """Let others work in it."""
        self._closed = True
        self._unlock()

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def standing(output: Path) -> Path | None:
    """Where that lies which an output holds: there, or aside if its replacement was killed midway. None if it is empty."""
    output = Path(os.path.realpath(output))
    return next((place for place in (output, _displaced(output)) if place.is_dir() and any(place.iterdir())), None)


def _displaced(output: Path) -> Path:
    return output.with_name(f".{output.name}.merging-old")


def _gives_way(place: Path, stay: Collection[str]) -> bool:
    """Whether a folder is a merge that was rejected, and nobody's source."""
    certificate = place / CERTIFICATE_FILE
    if place.is_symlink() or os.path.realpath(place) in stay or (place / ADAPTER_CONFIG).exists() or not certificate.is_file():
        return False
    try:
        return read_config(certificate).get("holds") is False
    except InputError:
        return False


def _put(folder: Path, place: Path, old: Path) -> None:
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    folder.rename(place)
    (place / JOURNAL).unlink(missing_ok=True)  # after it: a kill before would make the merge start afresh
    sync_folder(place.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
