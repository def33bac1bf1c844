"""`bonetune pull`: an artifact from the hub, of which nothing can run, whole or not at all."""

import glob
import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bonetune.errors import InputError
from bonetune.files import folder_written_beside, usable_folder
from bonetune.formats.tensors import sha256
from bonetune.hub.connection import connected
from bonetune.hub.contents import belongs_to_one, certificates_in, changed_since, check_names, hashes_in, is_safe, kind_of

if TYPE_CHECKING:
    from huggingface_hub import RepoFile


@dataclass(frozen=True)
class Pulled:
    """What was fetched.

    Args:
        folder: where it lies.
        commit: hash of the commit that it is.
        kind: adapter, model or gguf.
        files: names of the files.
        left_out: names of the repository's other files: pickles, code, what no artifact needs.
        certified: names of the files whose hashes are those of the certificate.
        holds: what the certificates say; None: there are none.
    """

    folder: str
    commit: str
    kind: str
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    certified: tuple[str, ...]
    holds: bool | None


def pull(
    repo: str,
    folder: str,
    *,
    revision: str | None = None,
    overwrite: bool = False,
    include_run: bool = False,
    endpoint: str | None = None,
) -> Pulled:
    """Fetch an adapter, a model or a GGUF file from the Hugging Face hub.

    Only files in which nothing can run are fetched: safetensors, GGUF, JSON, texts, tokenizers; no code and no pickles. Each
    one's hash is compared with the hub's, and with certificate.json where that has one. The folder appears when all of them
    are there.

    Args:
        repo: "owner/name".
        folder: to write.
        revision: branch, tag or commit; None: main.
        overwrite: replace the artifact that `folder` holds; other files in it stay, unless one of the same name is fetched.
        include_run: fetch the run's settings, prompts and samples as well, if they were pushed. Settings of strangers can ask
            for code of the base model: read run.yaml before the adapter is used.
        endpoint: address of the hub; None: $HF_ENDPOINT, or huggingface.co.

    Raises:
        InputError: no such repository, no artifact in it that is safe to load, names that lead out of the folder, files that
            are not what the hub or the certificate says, a folder that holds something else, or no connection.

    Example:
        >>> bonetune.pull("me/maths-adapter", "adapter").files
    """
    from huggingface_hub import RepoFile

    place = Path(folder)
    _check_place(place, overwrite)
    with connected(repo, endpoint) as api:
        commit = str(api.model_info(repo, revision=revision).sha)
        if len(commit) != 40 or not set(commit) <= set("0123456789abcdef"):  # it becomes part of a path
            raise InputError(f"Repository {repo!r} gives {commit!r} for a commit, which is none.")
        tree = api.list_repo_tree(repo, recursive=True, revision=commit)
        listed = {item.path: item for item in tree if isinstance(item, RepoFile)}
        kind, wanted = _wanted(repo, [*listed], include_run)
        exactly = [glob.escape(name) for name in wanted]
        with folder_written_beside(place, replace=True) as beside:
            api.snapshot_download(repo, revision=commit, local_dir=beside, allow_patterns=exactly)
            shutil.rmtree(beside / ".cache", ignore_errors=True)
            _check_files(repo, beside, {name: listed[name] for name in wanted})
            certificates = certificates_in(beside, wanted)
            if changed := changed_since(beside, certificates, wanted):
                raise InputError(
                    f"Repository {repo!r}: {', '.join(changed)} changed after being certified, so it was not written."
                )
            _keep_others(place, beside)
    left_out = tuple(sorted(name for name in listed if name not in wanted and name != ".gitattributes"))
    certified = tuple(sorted({name for certificate in certificates for name in hashes_in(certificate) if name in wanted}))
    holds = all(certificate.get("holds") is True for certificate in certificates) if certificates else None
    return Pulled(folder, commit, kind, tuple(wanted), left_out, certified, holds)


def _check_place(place: Path, overwrite: bool) -> None:
    usable_folder(place, "Folder")
    if not place.exists() or not any(place.iterdir()):
        return
    if not overwrite:
        raise InputError(f"Folder {place} already exists: pass --overwrite, or choose another.")
    others = [path.name for path in place.iterdir() if path.is_dir() or not is_safe(path.name)]
    if others or kind_of(path.name for path in place.iterdir()) is None:
        what = f" ({', '.join(sorted(others)[:3])})" if others else ""
        raise InputError(f"Folder {place} holds something else than an artifact{what}: choose another.")


def _keep_others(place: Path, beside: Path) -> None:
    """Copy to the new folder what lies in the old one and is not of the artifact that it replaces."""
    for path in place.iterdir() if place.exists() else ():
        if not belongs_to_one(path.name) and not (beside / path.name).exists():
            shutil.copy2(path, beside / path.name)


def _wanted(repo: str, names: list[str], include_run: bool) -> tuple[str, list[str]]:
    """What kind of artifact the repository holds, and which of its files are fetched."""
    where = f"Repository {repo!r}"
    check_names(names, where)
    wanted = sorted(name for name in names if is_safe(name, include_run=include_run))
    folded = {name.casefold() for name in wanted}
    if len(folded) != len(wanted):
        raise InputError(f"{where} has files whose names differ in upper and lower case alone.")
    kind = kind_of(wanted)
    if kind is None:
        has = ", ".join(sorted(name for name in names if name not in wanted)[:5])
        raise InputError(
            f"{where} holds no adapter, model or GGUF file that is safe to load"
            + (f"; what it has besides is not fetched: {has}." if has else ".")
        )
    return kind, wanted


def _check_files(repo: str, folder: Path, listed: "dict[str, RepoFile]") -> None:
    """Raise if a file is not the one that was listed."""
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}
    wrong = sorted(there ^ listed.keys())
    for name in there & listed.keys():
        item = listed[name]
        same = sha256(folder / name) == item.lfs.sha256 if item.lfs else _git_hash(folder / name) == item.blob_id
        if not same:
            wrong.append(name)
    if wrong:
        raise InputError(f"Repository {repo!r} did not send the files that it lists: {', '.join(wrong)}. Try again.")


def _git_hash(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
