"""Which files of a folder or a repository are an artifact, and which have no business in one."""

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from bonetune.errors import InputError
from bonetune.files import CERTIFICATE_FILE, CONVERSION_FILE, PROMPTS_FILE, RUN_FILE, SUMMARY_FILE, read_config
from bonetune.formats.checkpoint import INDEX_FILE
from bonetune.formats.tensors import ADAPTER_CONFIG, ADAPTER_FILES, sha256
from bonetune.rwkv.tokenizer import VOCABULARY_FILE as WORLD_VOCABULARY

MODEL_CONFIG, CARD_FILE = "config.json", "README.md"
# What a run leaves behind besides its adapter: paths of this machine, texts of the training data.
RUN_FILES = {
    *(RUN_FILE, PROMPTS_FILE),
    *("metrics.jsonl", "samples.jsonl", "environment.json", "report.html", "loss.png"),
}
# What travels with weights.
_COMPANIONS = {
    *(ADAPTER_CONFIG, MODEL_CONFIG, CARD_FILE, CERTIFICATE_FILE, SUMMARY_FILE),
    *(CONVERSION_FILE, INDEX_FILE, "generation_config.json", "Modelfile"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "merges.txt", "vocab.txt", WORLD_VOCABULARY, "preprocessor_config.json", "processor_config.json"),
    *("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE"),
}
# What is written beside an artifact that is a single file, with its name before theirs.
_BESIDE_A_FILE = (f".{CERTIFICATE_FILE}", f".{CONVERSION_FILE}")
# Names of weights, by the kind of artifact that they would be loaded with.
_WEIGHTS_OF = {
    "adapter": re.compile(r"adapter_model[^/]*\.safetensors(\.index\.json)?"),
    "model": re.compile(r"model[^/]*\.safetensors(\.index\.json)?"),
}
# Types of file in which nothing can run when they are read.
_SAFE = (".safetensors", ".gguf", ".Modelfile", ".json", ".txt", ".md", ".model", ".jinja", ".tiktoken")
_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f\\:]")


def goes_along(name: str, *, include_run: bool = False) -> bool:
    """Whether a file of this name, beside an artifact's safetensors, is published with them."""
    return (
        name in _COMPANIONS
        or name.endswith((".gguf", ".model", ".Modelfile", *_BESIDE_A_FILE))
        or (include_run and name in RUN_FILES)
    )


def is_safe(name: str, *, include_run: bool = False) -> bool:
    """Whether a file of this name, of a stranger's repository, can be fetched: nothing that runs when it is loaded, no run."""
    path = PurePosixPath(name)
    if path.name in RUN_FILES:
        return include_run
    return path.suffix in _SAFE or path.name in _COMPANIONS


def are_weights(name: str, kind: str) -> bool:
    """Whether weights of this name would be loaded with an artifact of this kind, adapter or model, that lies beside them."""
    return kind in _WEIGHTS_OF and _WEIGHTS_OF[kind].fullmatch(name) is not None


def belongs_to_one(name: str) -> bool:
    """Whether a file of this name tells of the one adapter or model in its folder, and of no other that takes its place."""
    return name in _COMPANIONS or name.endswith(".model") or any(are_weights(name, kind) for kind in _WEIGHTS_OF)


def check_names(names: Iterable[str], where: str) -> None:
    """Raise `InputError` if one of the names that a server gave could be written outside its folder, or hides in it."""
    wrong = [name for name in names if _FORBIDDEN.search(name) or not all(_is_plain(part) for part in name.split("/"))]
    if wrong:
        raise InputError(f"{where} names files outside its folder, or that no folder can hold: {', '.join(map(repr, wrong))}.")


def kind_of(names: Iterable[str]) -> str | None:
    """What an artifact of these files is: adapter, model or gguf; None: none."""
    names = set(names)
    if ADAPTER_CONFIG in names:
        return "adapter" if ADAPTER_FILES[0] in names else None
    if MODEL_CONFIG in names and any(name.endswith(".safetensors") for name in names):
        return "model"
    return "gguf" if any(name.endswith(".gguf") for name in names) else None


def hashes_in(certificate: dict[str, Any]) -> dict[str, str]:
    """sha256 of each file that a certificate is of, by its name."""
    files = certificate.get("files")
    return {str(name): str(digest) for name, digest in files.items()} if isinstance(files, dict) else {}


def certificates_in(folder: Path, names: Iterable[str]) -> list[dict[str, Any]]:
    """The certificates among the files of a folder."""
    return [read_config(folder / name) for name in names if name == CERTIFICATE_FILE or name.endswith(_BESIDE_A_FILE[0])]


def changed_since(folder: Path, certificates: Iterable[dict[str, Any]], names: Iterable[str]) -> list[str]:
    """Which of the files of a folder are no longer those that were certified."""
    names = set(names)
    hashes = [(name, digest) for certificate in certificates for name, digest in hashes_in(certificate).items()]
    return sorted({name for name, digest in hashes if name in names and sha256(folder / name) != digest})


def _is_plain(part: str) -> bool:
    return part not in ("", ".", "..") and part.rstrip(". ") == part and part not in (".git", ".cache")
