"""What a merge changes in a base model's files: which stored tensors, how, and which it adds."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bonetune.errors import AdapterFileError, InputError
from bonetune.formats import bone, miss
from bonetune.formats.checkpoint import DTYPES, Checkpoint, Stored
from bonetune.formats.fitting import Fitted, fit
from bonetune.formats.peft_folder import peft_type
from bonetune.formats.state import AdapterState
from bonetune.ops import Update
from bonetune.tuner import BoneLayer
from bonetune.tuner.layer import name_without_adapters

_READERS = {"BONE": bone.read, "MISS": miss.read}
TOKENS = ".token_adapter.trainable_tokens_delta"
FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class NotStreamed(Exception):  # noqa: N818  (it is no error: such a merge is made in memory)
    """Why a merge cannot be made file by file."""


@dataclass(frozen=True)
class Change:
    """What becomes of one parameter.

    Args:
        updates: the adapters' updates, added to what is there; their tensors in float32.
        bone: the adapted layer, which knows how the stored tensor is cut into matrices; None without updates.
        whole: stands in the parameter's place, before the updates are added.
        rows: numbers of rows (n), and what stands in their place (n, ...).
    """

    updates: tuple[Update, ...] = ()
    bone: BoneLayer | None = None
    whole: Tensor | None = None
    rows: tuple[Tensor, Tensor] | None = None

    def equals(self, other: "Change") -> bool:
        """Whether it does the same to the same tensor."""
        return len(self.updates) == len(other.updates) and all(
            (
                _same(self.whole, other.whole),
                all(_same(*pair) for pair in zip(self.rows or (None, None), other.rows or (None, None), strict=True)),
                all(
                    (mine.spec, mine.scale) == (theirs.spec, theirs.scale) and _same(mine.theta, theirs.theta)
                    for mine, theirs in zip(self.updates, other.updates, strict=True)
                ),
            )
        )


@dataclass(frozen=True)
class Output:
    """A tensor of the merged model: its name, from which stored tensor it is made and how (None: not at all), its dtype."""

    name: str
    source: Stored
    change: Change | None
    dtype: torch.dtype


@dataclass(frozen=True)
class Plan:
    """A merge, file by file.

    Args:
        states: the adapters.
        scales: the factor of each one's update.
        fitted: the first adapter on its base model.
        checkpoint: the base model's files.
        files: what is in each file of the merged model, in the order of its bytes.
        unties: whether embeddings and head, one in the base model, become two.
        dtype: of the merged weights; None keeps each one's.
    """

    states: tuple[AdapterState, ...]
    scales: tuple[float, ...]
    fitted: Fitted
    checkpoint: Checkpoint
    files: Mapping[str, list[Output]]
    unties: bool
    dtype: torch.dtype | None

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed merge has to have in common with the one that was interrupted."""
        return {
            "bonetune": metadata.version("bonetune"),
            "base": self.checkpoint.fingerprint,
            "files": [[file, stat.st_size, stat.st_mtime_ns] for file, stat in self._stats()],
            "adapters": [dict(state.source.files) for state in self.states],
            "scales": [*self.scales],
            "dtype": str(self.dtype),
        }

    def _stats(self) -> list[tuple[str, os.stat_result]]:
        return [(file, (self.checkpoint.folder / file).stat()) for file in self.checkpoint.files]

    def bytes_of(self, file: str) -> int:
        """What a file's tensors take."""
        return sum(math.prod(out.source.shape) * out.dtype.itemsize for out in self.files[file])


def read_states(adapters: Sequence[str]) -> tuple[AdapterState, ...]:
    """Read the adapters.

    Raises:
        NotStreamed: one is not of the Bone family.
        AdapterFileError: files that are torn, or hold values that are not finite.
    """
    states = []
    for adapter in adapters:
        method = peft_type(Path(adapter))
        if method not in _READERS:
            raise NotStreamed(f"{adapter} is an adapter of PEFT's {method}")
        states.append(_READERS[method](Path(adapter)))
    return tuple(states)


def make_plan(
    states: Sequence[AdapterState],
    base: str,
    scales: Sequence[float],
    dtype: torch.dtype | None,
    *,
    trust_remote_code: bool = False,
) -> Plan:
    """Find each adapted tensor in the base model's files.

    Args:
        states: the adapters.
        base: the base model's name or folder.
        scales: a factor of the update for each adapter.
        dtype: of the merged weights; None keeps each one's.
        trust_remote_code: run code that comes with the model.

    Raises:
        NotStreamed: the files do not hold what is adapted as the model has it: experts stored one by one, quantized weights.
        AdapterFileError: tensors that do not fit the base model.
        InputError: changes of one parameter, or of two that are tied, that do not add up.
    """
    if not hasattr(os, "preadv"):
        raise NotStreamed("this system cannot read a part of a file into memory that is there")
    if any(state.config.task_type == "SEQ_CLS" for state in states):
        raise NotStreamed("a classifier's head and the names of its classes are made with the model")
    fitted = [fit(state, base, trust_remote_code=trust_remote_code) for state in states]
    model = fitted[0].model
    try:
        checkpoint = fitted[0].checkpoint
    except InputError as error:
        raise NotStreamed(str(error)) from error
    if not isinstance(checkpoint, Checkpoint):
        raise NotStreamed("the base model is no folder of safetensors files")
    _check_kind(checkpoint, model)
    changes = _changes(fitted, scales)
    parameters = {name_without_adapters(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    by_name, made_from, unties = _with_ties(changes, parameters, model, checkpoint)
    stored, added = {}, []
    for parameter, change in by_name.items():
        _check_shapes(parameter, parameters[parameter], change, states)
        if parameter in made_from:
            added.append((parameter, checkpoint.stored[made_from[parameter]], change))
            continue
        name = _stored_name(checkpoint, parameter)
        if checkpoint.stored[name].shape != tuple(parameters[parameter].shape):
            raise NotStreamed(f"{name} is not stored in the shape that {parameter} has")
        if DTYPES[checkpoint.stored[name].dtype] not in FLOATING:
            raise NotStreamed(f"{name} is stored as {checkpoint.stored[name].dtype}")
        stored[name] = change
    files: dict[str, list[Output]] = {}
    for file in checkpoint.files:
        own = checkpoint.headers[file].tensors
        files[file] = [Output(name, item, stored.get(name), _dtype(item, dtype)) for name, item in own.items()]
    for name, source, change in added:
        there = [i for i, out in enumerate(files[source.file]) if out.name == name]
        out = Output(name, source, change, _dtype(source, dtype))
        if there:
            files[source.file][there[0]] = out
        elif name in checkpoint.stored:
            raise NotStreamed(f"{name} is stored in another file than what it is tied to")
        else:
            files[source.file].append(out)
    return Plan(tuple(states), tuple(scales), fitted[0], checkpoint, files, unties, dtype)


def _check_kind(checkpoint: Checkpoint, model: Any) -> None:
    config, kinds = checkpoint.config, {type(model).__name__, type(model.base_model).__name__}
    if "quantization_config" in config:
        raise NotStreamed("the base model's files hold quantized weights")
    if not kinds & {*(config.get("architectures") or kinds)}:
        raise NotStreamed(f"the base model's files are of a {config['architectures'][0]}, not of a {type(model).__name__}")


def _changes(fitted: Sequence[Fitted], scales: Sequence[float]) -> dict[str, Change]:
    """By the parameter's name, of all adapters together."""
    changes: dict[str, Change] = {}
    owner: dict[str, str] = {}
    for one, scale in zip(fitted, scales, strict=True):
        own = {name: Change(whole=tensor) for name, tensor in one.state.whole.items() if not name.endswith(TOKENS)}
        own |= {
            f"{name.removesuffix(TOKENS)}.weight": Change(rows=(_token_indices(one.state, name), tensor))
            for name, tensor in one.state.whole.items()
            if name.endswith(TOKENS)
        }
        for layer in one:
            update = one.update(layer, scale)
            update, name = update._replace(theta=update.theta.float()), one.parameter(layer)
            own[name] = replace(own.get(name, Change()), updates=(update,), bone=one.layers[layer])
        for name, change in own.items():
            before = changes.get(name, Change())
            if name in changes and not (_only_updates(before) and _only_updates(change)) and not _same_whole(before, change):
                raise InputError(
                    f"Adapters {owner[name]} and {one.state.source.path} both name {name}, and at least one of them replaces "
                    "its values: such changes do not add up. Merge one of the two."
                )
            changes[name] = replace(change, updates=before.updates + change.updates, bone=change.bone or before.bone)
            owner[name] = one.state.source.path
    return changes


def _only_updates(change: Change) -> bool:
    return change.whole is None and change.rows is None


def _only_rows(change: Change) -> bool:
    return change.rows is not None and change.whole is None and not change.updates


def _same_whole(a: Change, b: Change) -> bool:
    """Whether both put the same values in place: the base model's own, mostly, which PEFT writes beside tied adapters."""
    return a.rows is None and b.rows is None and _same(a.whole, b.whole)


def _token_indices(state: AdapterState, name: str) -> Tensor:
    layer, indices = name.removesuffix(TOKENS), state.config.trainable_token_indices
    if isinstance(indices, dict):
        indices = next((value for key, value in indices.items() if f".{layer}".endswith(f".{key}")), None)
    if indices is None or len(indices) != len(state.whole[name]):
        raise AdapterFileError(f"{state.source.path} does not say which tokens the rows of {name} are, one for each.")
    return torch.tensor([*indices])


def _with_ties(
    changes: Mapping[str, Change], parameters: Mapping[str, nn.Parameter], model: Any, checkpoint: Checkpoint
) -> tuple[dict[str, Change | None], dict[str, str], bool]:
    """Changes by parameter, one for each tensor that is to be stored; what is made from another's tensor; whether ties part."""
    by_name: dict[str, Change | None] = dict(changes)
    made_from: dict[str, str] = {}
    groups: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(id(parameter), []).append(name)
    unties = False
    for group in groups.values():
        touched = [changes[name] for name in group if name in changes]
        if len(group) == 1 or not touched:
            continue
        there = [name for name in group if name in checkpoint.stored]
        if not all(checkpoint.same_values(there[0], name) for name in there[1:]):
            raise NotStreamed(f"{', '.join(there)} are one tensor by the base model's config.json, and differ in its files")
        if any(change.rows is not None for change in touched) and not all(_only_rows(change) for change in touched):
            raise InputError(
                f"{', '.join(group)} are one tensor in the base model, of which rows are trained (trainable_token_indices) and "
                "which is adapted, too: such changes cannot be merged. Use the adapter unmerged, or train one alone."
            )
        if all(change.rows is not None for change in touched) and all(change.equals(touched[0]) for change in touched):
            touched *= len(group)  # PEFT trains the rows of all that are tied
        if len(touched) >= len(group) and all(change.equals(touched[0]) for change in touched):
            kept = next((name for name in group if name in checkpoint.stored), group[0])
            by_name |= {name: touched[0] for name in group if name in checkpoint.stored or name == kept}
            for name in group:
                if name not in checkpoint.stored and name != kept:
                    by_name.pop(name, None)
            continue
        embedding, head = _embedding_and_head(model)
        nested = any(isinstance(value, dict) and "tie_word_embeddings" in value for value in checkpoint.config.values())
        if embedding is None or head is None or {*group} != {embedding, head} or embedding not in checkpoint.stored or nested:
            raise NotStreamed(f"{', '.join(group)} are one tensor in the base model's files, and would not be one when merged")
        by_name[head], made_from[head], unties = changes.get(head), embedding, True
    return by_name, made_from, unties


def _embedding_and_head(model: Any) -> tuple[str | None, str | None]:
    names = {id(module): name_without_adapters(name) for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()

    def parameter(module: Any) -> str | None:
        return None if module is None else f"{names[id(module)]}.weight"

    return parameter(embedding), parameter(head)


def _check_shapes(parameter: str, like: Tensor, change: Change | None, states: Sequence[AdapterState]) -> None:
    if change is None:
        return
    paths = ", ".join(state.source.path for state in states)
    if change.whole is not None and change.whole.shape != like.shape:
        raise AdapterFileError(
            f"{parameter} of adapter {paths} has shape {tuple(change.whole.shape)}, the base model's {tuple(like.shape)}."
        )
    if change.rows is not None:
        indices, values = change.rows
        if values.shape[1:] != like.shape[1:] or int(indices.max()) >= len(like):
            raise AdapterFileError(
                f"The rows of {parameter} in adapter {paths} (shape {tuple(values.shape)}, up to number {int(indices.max())}) "
                f"do not fit the base model's shape {tuple(like.shape)}."
            )


def _stored_name(checkpoint: Checkpoint, parameter: str) -> str:
    try:
        return checkpoint.name_of(parameter)
    except InputError as error:
        raise NotStreamed(f"{parameter} is not in the base model's files under a name of its own") from error


def _dtype(stored: Stored, wanted: torch.dtype | None) -> torch.dtype:
    own = DTYPES[stored.dtype]
    return wanted if wanted is not None and own in FLOATING else own


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and a.shape == b.shape and bool(torch.equal(a, b)))
