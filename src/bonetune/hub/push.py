"""`bonetune push`: an adapter, a merged model or what one was converted to becomes a repository on the hub, in one commit."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bonetune.errors import InputError
from bonetune.formats.checkpoint import Checkpoint, read_header
from bonetune.formats.tensors import ADAPTER_FILES
from bonetune.hub.connection import connected
from bonetune.hub.contents import are_weights, certificates_in, changed_since, goes_along, kind_of
from bonetune.hub.texts import published_base, texts_to_publish

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete


@dataclass(frozen=True)
class Pushed:
    """What was uploaded.

    Args:
        url: where it is to be seen.
        commit: the commit's hash.
        files: names of the files that the commit holds.
        rewritten: those of them in which local paths were replaced, or the base model's name.
        left_out: what else lies in the folder.
        deleted: names of the files of an earlier push that the commit removed.
    """

    url: str
    commit: str
    files: tuple[str, ...]
    rewritten: tuple[str, ...]
    left_out: tuple[str, ...]
    deleted: tuple[str, ...]


def push(
    folder: str,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    base_model_id: str | None = None,
    include_run: bool = False,
    endpoint: str | None = None,
) -> Pushed:
    """Upload an adapter, a merged model or a GGUF file to the Hugging Face hub, as one commit.

    What goes: weights, configuration, tokenizer, model card (a short one is made if there is none), certificate.json and
    summary.json. What never goes: checkpoints, caches, files that are not an artifact's. In the copies of the texts that go,
    absolute paths of this machine become the last part of them. Weights of an earlier push of the same kind (adapter or
    model) that are no longer there are deleted by the same commit.

    Args:
        folder: of the artifact.
        repo: "name" or "owner/name"; it is created if there is none.
        private: nobody else can see it; else a new repository is what its owner's settings say, mostly public.
        revision: branch to commit to, created if need be; None: main.
        message: of the commit.
        base_model_id: the base model's name on the hub, for an adapter whose configuration names a folder.
        include_run: upload the run's settings, metrics, prompts and samples as well. They tell of this machine's paths and
            hold texts of the training data.
        endpoint: address of the hub; None: $HF_ENDPOINT, or huggingface.co.

    Raises:
        InputError: no artifact in the folder, one that is torn or has changed since it was certified, a certificate that does
            not hold, a base model that only this machine has, a public repository where a private one is asked for, or a hub
            that cannot be reached or refuses.

    Example:
        >>> bonetune.push("runs/first", "me/maths-adapter", private=True).url
    """
    place = Path(folder)
    if not place.is_dir():
        raise InputError(f"There is no folder {folder}.")
    kind, weights = _artifact(place)
    beside = [path.name for path in place.iterdir() if path.is_file() and goes_along(path.name, include_run=include_run)]
    names = sorted({*weights, *beside})
    _check_certificates(place, names)
    texts = texts_to_publish(place, names, kind, published_base(place, kind, base_model_id))
    files = sorted({*names, *texts})
    with connected(repo, endpoint) as api:
        url = api.create_repo(repo, private=True if private else None, exist_ok=True)
        if private and not api.model_info(url.repo_id).private:
            raise InputError(
                f"Repository {url.repo_id} exists and is public: make it private in its settings, or choose another."
            )
        if revision is not None:
            api.create_branch(url.repo_id, branch=revision, exist_ok=True)
        there = api.list_repo_files(url.repo_id, revision=revision)
        deleted = tuple(sorted(name for name in there if are_weights(name, kind) and name not in files))
        commit = api.create_commit(
            url.repo_id,
            operations=_operations(place, files, texts, deleted),
            commit_message=message or f"Upload {place.resolve().name} with bonetune",
            revision=revision,
        )
    left_out = tuple(sorted(path.name + "/" * path.is_dir() for path in place.iterdir() if path.name not in files))
    seen_at = str(url) if revision is None else f"{url}/tree/{revision}"
    rewritten = tuple(sorted(name for name in texts if name in names))
    return Pushed(seen_at, commit.oid, tuple(files), rewritten, left_out, deleted)


def _operations(
    place: Path, files: list[str], texts: dict[str, str], deleted: tuple[str, ...]
) -> "list[CommitOperationAdd | CommitOperationDelete]":
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    contents = {name: texts[name].encode() if name in texts else place / name for name in files}
    return [
        *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in contents.items()),
        *(CommitOperationDelete(path_in_repo=name) for name in deleted),
    ]


def _artifact(place: Path) -> tuple[str, list[str]]:
    """What kind of artifact lies in the folder, and the names of its safetensors files, which are whole."""
    kind = kind_of(path.name for path in place.iterdir())
    if kind is None:
        pickles = sorted(path.name for path in place.iterdir() if path.suffix in (".bin", ".pth", ".pt"))
        raise InputError(
            f"{place} holds no adapter (adapter_config.json, adapter_model.safetensors), no model (config.json, safetensors) "
            "and no GGUF file" + (f"; pickles are not uploaded ({', '.join(pickles)})." if pickles else ".")
        )
    if kind == "adapter":
        read_header(place / ADAPTER_FILES[0])
        return kind, [ADAPTER_FILES[0]]
    return kind, Checkpoint(place).files if kind == "model" else []


def _check_certificates(place: Path, names: list[str]) -> None:
    certificates = certificates_in(place, names)
    if not all(certificate.get("holds", True) for certificate in certificates):
        raise InputError(f"{place} is not what it was made from: its certificate does not hold.")
    if changed := changed_since(place, certificates, names):
        raise InputError(f"{place} has changed since it was certified: {', '.join(changed)}. Make it again.")
