"""Whether the files of a merged model are such a model: by its own config.json and the adapters, not by the plan's names."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from bonetune.errors import InputError
from bonetune.files import read_run
from bonetune.formats.checkpoint import DTYPES, Checkpoint
from bonetune.merging.plan import FLOATING, TOKENS, Change, Plan
from bonetune.models import AUTO_CLASSES, skeleton
from bonetune.tuner.layer import name_without_adapters

Groups = Mapping[str, tuple[str, ...]]


def misfits(plan: Plan, folder: Path) -> list[str]:
    """What is wrong with a merged model as a model.

    Each of its parameters has to be stored, in its shape and the dtype that was asked for; those that are tied alike; nothing
    besides but what the base model had. Each tensor of the adapters has to be in the plan's changes of its own parameter,
    once, and nothing else may be.

    Args:
        plan: what was to be written.
        folder: the finished model, with its config.json.
    """
    task = str(plan.states[0].config.task_type)
    trusted = any(read_run(Path(state.source.path)).get("trust_remote_code", False) for state in plan.states)
    try:
        merged = Checkpoint(folder)
        model = skeleton(str(folder), task_type=task if task in AUTO_CLASSES else "CAUSAL_LM", trust_remote_code=trusted)
    except InputError as error:
        return [str(error)]
    groups, before = _tied(model), _tied(plan.fitted.model)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}
    stored = {name: _stored(merged, group) for name, group in groups.items()}
    found = [*_files(plan, merged, shapes, groups), *_dtypes(plan, merged)]
    for name, places in stored.items():
        if not places and _stored(plan.checkpoint, before.get(name, ())):
            found.append(f"{name} is in none of the files")
        found += [
            f"{place} has shape {merged.stored[place].shape}, {name} has {shapes[name]}"
            for place in places
            if merged.stored[place].shape not in (shapes[name], _shape(plan.checkpoint, place))
        ]
    return [*dict.fromkeys(found), *_adapters(plan, groups, stored)]


def _tied(model: torch.nn.Module) -> dict[str, tuple[str, ...]]:
    """Each parameter's name, and those of all that are one with it."""
    of: dict[int, list[str]] = {}
    named = [(name_without_adapters(name), p) for name, p in model.named_parameters(remove_duplicate=False)]
    own = [(name, p) for name, p in named if ".bone_block." not in name]
    for name, parameter in own:
        of.setdefault(id(parameter), []).append(name)
    return {name: tuple(of[id(parameter)]) for name, parameter in own}


def _stored(checkpoint: Checkpoint, group: tuple[str, ...]) -> list[str]:
    """The names under which a parameter, or one that it is tied to, is stored."""
    places = []
    for name in group:
        try:
            places.append(checkpoint.name_of(name))
        except InputError:
            continue
    return places


def _shape(checkpoint: Checkpoint, name: str) -> tuple[int, ...] | None:
    return checkpoint.stored[name].shape if name in checkpoint.stored else None


def _files(plan: Plan, merged: Checkpoint, shapes: Mapping[str, object], groups: Groups) -> Iterator[str]:
    known = {place for name in shapes for place in _stored(merged, (name,))} | plan.checkpoint.stored.keys()
    yield from (f"{name} is nothing of the model's" for name in merged.stored.keys() - known)
    for group in {*groups.values()}:
        first, *others = _stored(merged, group) or [""]
        yield from (f"{first} and {other} are tied, and differ" for other in others if _differ(plan, merged, first, other))


def _differ(plan: Plan, merged: Checkpoint, one: str, other: str) -> bool:
    base = plan.checkpoint
    apart = one in base.stored and other in base.stored and not base.same_values(one, other)
    return not apart and not merged.same_values(one, other)


def _dtypes(plan: Plan, merged: Checkpoint) -> Iterator[str]:
    for name, stored in merged.stored.items():
        before, dtype = plan.checkpoint.stored.get(name), DTYPES[stored.dtype]
        wanted = None if before is None else DTYPES[before.dtype]
        if plan.dtype is not None and wanted in (None, *FLOATING):
            wanted = plan.dtype
        if wanted not in (None, dtype):
            yield f"{name} is {stored.dtype}"


def _adapters(plan: Plan, groups: Groups, stored: Mapping[str, list[str]]) -> list[str]:
    """Tensors of the adapters that the plan leaves away, and changes that no adapter asks for."""
    changes = {out.name: out.change for outs in plan.files.values() for out in outs if out.change is not None}
    taken: dict[tuple[str, int], int] = {}
    replaced: set[str] = set()
    problems = []
    for number, (state, scale) in enumerate(zip(plan.states, plan.scales, strict=True)):
        for layer, theta in state.tensors.items():
            module = layer.replace(".base_layer", "")
            names = [name for name in groups if name.rpartition(".")[0] == module]
            hits = [
                (place, index)
                for name in names
                for place in stored[name]
                for index, update in enumerate(changes.get(place, Change()).updates)
                if (place, index) not in taken or (len(groups[name]) > 1 and taken[place, index] == number)
                if (update.scale, update.spec) == (scale, state.spec(layer)) and _equal(update.theta, theta)
            ]
            places = list(dict.fromkeys(place for place, _ in hits))
            if not hits:
                problems.append(f"the adapter's {layer} is in no weight")
            first = next((stored[name] for name in names if hits and hits[0][0] in stored[name]), [])
            for place in [place for place in places if place in first]:
                taken[next(hit for hit in hits if hit[0] == place)] = number
        for key, tensor in state.whole.items():
            name = f"{key.removesuffix(TOKENS)}.weight" if key.endswith(TOKENS) else key
            places = stored.get(name, [])
            replaced |= {*places}
            if not places or not all(_holds(changes.get(place), key, tensor) for place in places):
                problems.append(f"the adapter's {key} is not in its place")
    for place, change in changes.items():
        if any((place, index) not in taken for index in range(len(change.updates))):
            problems.append(f"{place} has an update of no adapter's")
        if (change.whole is not None or change.rows is not None) and place not in replaced:
            problems.append(f"{place} is replaced by no adapter's values")
    return problems


def _holds(change: Change | None, key: str, tensor: Tensor) -> bool:
    if change is None:
        return False
    own = change.whole if not key.endswith(TOKENS) else None if change.rows is None else change.rows[1]
    return own is not None and _equal(own, tensor)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.equal(a.float(), b.float()))
