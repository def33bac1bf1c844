"""certificate.json: what was proven, of which files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from bonetune.diagnostics import environment
from bonetune.files import CERTIFICATE_FILE
from bonetune.formats.tensors import sha256

_PACKAGES = ("bonetune", "torch", "transformers", "peft", "safetensors")


class Proof(Protocol):
    """What both kinds of certificate are."""

    @property
    def holds(self) -> bool:
        """Whether the artifact is what it should be."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """As certificate.json holds it; `method` says which kind it is."""
        ...


def record(
    certificate: Proof,
    files: Mapping[str, str],
    *,
    base_fingerprint: str | None = None,
    adapters: Sequence[Mapping[str, str]] = (),
) -> dict[str, Any]:
    """The content of certificate.json.

    Args:
        certificate: what was found.
        files: sha256 of every file of the artifact, by its name (`hashes`).
        base_fingerprint: of the base model (`Checkpoint.fingerprint`), if it has one.
        adapters: sha256 of the files of each adapter, by their names.
    """
    known = environment()
    return certificate.to_dict() | {
        "files": dict(sorted(files.items())),
        "base_fingerprint": base_fingerprint,
        "adapters": [dict(sorted(adapter.items())) for adapter in adapters],
        "versions": {name: known[name] for name in _PACKAGES if name in known},
    }


def hashes(folder: Path, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """sha256 of every file in a folder but its certificate, by its path in it.

    Args:
        folder: the artifact.
        known: hashes of files that need not be read again.
    """
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    found.pop(CERTIFICATE_FILE, None)
    known = known or {}
    return {name: known[name] if name in known else sha256(path) for name, path in found.items()}
