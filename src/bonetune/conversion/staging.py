"""Nothing half-written, nothing of the user's replaced unasked, and what failed its certificate kept aside."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from safetensors import SafetensorError

from bonetune.errors import InputError, RunError
from bonetune.files import CONVERSION_FILE, no_room, size_in_words


class Rejected(Exception):  # noqa: N818  (it never leaves `staged_for`)
    """What was written is not what it was made of.

    Args:
        expected: what it should have been, "the adapter".
        found: what it is instead, in sentences.
    """

    def __init__(self, expected: str, found: str) -> None:
        super().__init__(expected, found)
        self.expected, self.found = expected, found


@contextmanager
def staged_for(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A place for what becomes `target`, and for its reports beside it; when the block ends well, all take their places.

    Args:
        target: file or folder.
        overwrite: replace the conversion that lies there.

    Raises:
        InputError: something that is not to be replaced lies where one of them belongs.
        RunError: the disk is full, and nothing stays; or the block raised `Rejected`, and the message says where it lies.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    new, old = beside / "new", beside / "old"
    try:
        new.mkdir()
        old.mkdir()
        yield new / target.name
        places = _places(new, target, target)
        _check_places([*places.values()], target, overwrite)
        _move(places, old)
    except Rejected as rejected:
        aside = _place_aside(new, target)
        _move(_places(new, target, aside), old)
        raise RunError(
            f"What was written is not {rejected.expected}, so {target} was left alone and it lies at {aside}. It is "
            f"{rejected.found}"
        ) from None
    except (OSError, RuntimeError, SafetensorError) as error:
        if (words := no_room(error)) is None:
            raise
        free = size_in_words(shutil.disk_usage(target.parent).free)
        raise RunError(
            f"{target} could not be written ({words}): the disk has {free} free. Nothing of it stays; make room, or choose "
            "another destination."
        ) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
        with suppress(OSError):  # what could not be put back stays
            old.rmdir()
            beside.rmdir()


def is_ours(place: Path) -> bool:
    """Whether a conversion made what lies there: a folder with its report in it, or a file with its report beside it."""
    beside = place.with_name(f"{place.name}.{CONVERSION_FILE}")
    return (place / CONVERSION_FILE).is_file() or (place.is_file() and beside.is_file())


def _places(new: Path, target: Path, place: Path) -> dict[Path, Path]:
    """Where each item goes that was staged for `target`, if that becomes `place`."""
    return {item: place.with_name(place.name + item.name.removeprefix(target.name)) for item in sorted(new.iterdir())}


def _check_places(places: list[Path], target: Path, overwrite: bool) -> None:
    taken = [place for place in places if os.path.lexists(place)]
    if taken and not overwrite:
        raise InputError(f"There already is {' and '.join(map(str, taken))}: pass --overwrite, or choose another destination.")
    if wrong := [place for place in taken if not (is_ours(place) if place == target else place.is_file())]:
        raise InputError(f"{' and '.join(map(str, wrong))} was not made by a conversion: choose another destination.")


def _place_aside(new: Path, target: Path) -> Path:
    """`target`.rejected, or with a number, where nothing lies but an earlier rejected conversion."""
    for number in count(1):
        aside = target.with_name(f"{target.name}.rejected" + (f"-{number}" if number > 1 else ""))
        if is_ours(aside) or not any(os.path.lexists(place) for place in _places(new, target, aside).values()):
            return aside
    raise AssertionError


def _move(places: Mapping[Path, Path], old: Path) -> None:
    """Rename each item to its place and delete what was there; if that fails or is interrupted, all is as it was."""
    begun: list[tuple[Path, Path]] = []
    try:
        for item, place in places.items():
            begun.append((item, place))
            if os.path.lexists(place):
                place.rename(old / item.name)
            item.rename(place)
    except BaseException:
        for item, place in reversed(begun):
            if not os.path.lexists(item):
                place.rename(item)
            if os.path.lexists(old / item.name):
                (old / item.name).rename(place)
        raise
    for item in old.iterdir():
        shutil.rmtree(item, ignore_errors=True) if item.is_dir() and not item.is_symlink() else item.unlink()
