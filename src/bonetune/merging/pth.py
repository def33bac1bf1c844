"""Merging into an RWKV `.pth`: the base model's tensors are mapped, merged one by one, and go straight into the new file."""

import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bonetune.certificates import Certificate
from bonetune.certificates.layers import LayerCheck, LayersCertificate, check_layer, random_inputs
from bonetune.errors import AdapterFileError, BonetuneError, InputError, RunError, SpecError
from bonetune.files import file_written_beside
from bonetune.formats.state import AdapterState
from bonetune.merging.checked import bits
from bonetune.models import parse_dtype
from bonetune.ops import PlainWeight, Update, adapted_linear, merge
from bonetune.torch_files import Layout, map_tensors, write_one_by_one


def merge_pth(
    adapters: AdapterState | Sequence[AdapterState],
    base: Path,
    output: Path,
    *,
    scale: float | Sequence[float] = 1.0,
    dtype: str = "auto",
    overwrite: bool = False,
    tolerance: float | None = None,
    compare: Callable[[Path], Certificate] | None = None,
) -> LayersCertificate | Certificate:
    """Merge adapters into an RWKV model, and compare what was written with what training computes, layer by layer.

    The file has the base model's names, in its order, with its shapes and dtypes. Tensors that an adapter trained whole
    replace the base model's; trained states to begin with, which an RWKV-6 base may lack, follow them. In memory there is one
    weight at a time, in float32 and a few times over; of the base model and the new file, the pages that the system likes to
    keep.

    Args:
        adapters: one or several, for layers `blocks.0.att.key`.
        base: the base model's `.pth`.
        output: the file to write.
        scale: factor of the update, for all adapters or for each. It does not change what was trained whole.
        dtype: of all floating-point tensors; `auto` keeps the base model's.
        overwrite: replace the file if it exists.
        tolerance: how far a layer's outputs may be off, relative to them; None: by the dtype.
        compare: makes a further certificate of the written file, before it takes its place.

    Returns:
        the certificate of `compare`, if there is one, else that of the layers.

    Raises:
        InputError: the output exists or is one of the sources, a scale that is not finite, a base model that cannot be read.
        AdapterFileError: tensors that the base model has no place for, or not of their shapes; all of them.
        RunError: the disk is full, or the written weights do not compute what the adapter does; the file is kept aside as
            `<output>.rejected`, and what was at `output` stays.
    """
    states = [adapters] if isinstance(adapters, AdapterState) else list(adapters)
    scales = [float(scale)] * len(states) if isinstance(scale, int | float) else [float(one) for one in scale]
    wanted = parse_dtype(dtype)
    if not states or len(scales) != len(states) or not all(math.isfinite(one) for one in scales):
        raise InputError(f"Give an adapter and a finite scale for each: got {len(states)} adapters and scale {scale!r}.")
    _check_output(states, base, output, overwrite)
    weights = map_tensors(base)
    weights |= _states(states, weights, base)
    updates, whole = _plan(states, scales, weights, base)
    layouts = {name: Layout(weight.shape, _dtype(weight, wanted)) for name, weight in weights.items()}

    def value(name: str) -> Tensor:
        before = whole.get(name, weights[name])
        after = before if name not in updates else merge(_for_merge(before, layouts[name].dtype), updates[name])
        after = after.to(layouts[name].dtype)
        if after is not before and not after.isfinite().all() and before.isfinite().all():
            raise RunError(f"{name} has values that {str(after.dtype).removeprefix('torch.')} does not reach: pass --dtype.")
        return after

    with file_written_beside(output) as beside:
        _check_space(output, layouts)
        try:
            write_one_by_one(beside, layouts, value)
        except OSError as error:
            raise RunError(f"{output} could not be written: {error}. What was there is as it was.") from error
        certificate = _certificate(beside, weights, updates, whole, layouts, tolerance)
        if certificate.holds and compare is not None:
            certificate = compare(beside)
        if not certificate.holds:
            rejected = output.with_name(f"{output.name}.rejected")
            beside.replace(rejected)
            raise RunError(f"The merged model is not the adapted one, and was kept aside as {rejected}. It is {certificate}.")
    return certificate


def _states(states: Sequence[AdapterState], weights: Mapping[str, Tensor], base: Path) -> dict[str, Tensor]:
    """Room for the states to begin with that adapters trained and the base model lacks: zeros, as it has without them."""
    found = {}
    for name in sorted({name for state in states for name in state.whole if name.endswith(".att.time_state")} - set(weights)):
        heads = weights.get(name.replace("time_state", "time_faaaa"))
        if name.replace("time_state", "r_k") in weights:
            raise InputError(
                f"{base} is an RWKV-7 model, in whose files other programs do not read states ({name}): keep the adapter, or "
                "convert it to rwkv-disha."
            )
        if heads is None:  # no model that has such a layer: told with all else that does not fit
            continue
        number, n = heads.shape
        found[name] = torch.zeros(number, n, n, dtype=heads.dtype)
    return found


def _check_output(states: Sequence[AdapterState], base: Path, output: Path, overwrite: bool) -> None:
    if not base.is_file():
        raise InputError(f"There is no base model {base}.")
    if output.is_dir():
        raise InputError(f"Output {output} is a folder: name a file.")
    if output.suffix != ".pth":
        raise InputError(f"Output {output} becomes a file of RWKV's: give it a name that ends in .pth.")
    for source in (base, *(Path(state.source.path) for state in states)):
        if output.exists() and source.exists() and os.path.samefile(source, output):
            raise InputError(f"Output {output} is what is merged: choose another.")
    if output.exists() and not overwrite:
        raise InputError(f"Output {output} already exists: pass --overwrite, or choose another.")


def _check_space(output: Path, layouts: dict[str, Layout]) -> None:
    needed = sum(math.prod(layout.shape) * layout.dtype.itemsize for layout in layouts.values())
    if (free := shutil.disk_usage(output.parent).free) < needed:
        raise RunError(f"The disk of {output.parent} has {free / 1e9:.2f} GB free and {output.name} needs {needed / 1e9:.2f}.")


def _plan(
    states: Sequence[AdapterState], scales: Sequence[float], weights: dict[str, Tensor], base: Path
) -> tuple[dict[str, list[Update]], dict[str, Tensor]]:
    """The updates of each weight and what replaces whole tensors, by their names in the base model."""
    updates: dict[str, list[Update]] = {}
    whole: dict[str, Tensor] = {}
    wrong = []
    for state, scale in zip(states, scales, strict=True):
        for layer, theta in state.tensors.items():
            update = Update(theta, state.spec(layer), scale)
            fault = _fault(layer, update, weights.get(f"{layer}.weight"))
            if fault is None:
                updates.setdefault(f"{layer}.weight", []).append(update)
            else:
                wrong.append(fault)
        for name, tensor in state.whole.items():
            if name not in weights:
                wrong.append(f"there is no {name}, which was trained whole")
            elif weights[name].shape != tensor.shape:
                wrong.append(f"{name} has shape {tuple(weights[name].shape)}, and was trained as {tuple(tensor.shape)}")
            whole[name] = tensor
    twice = [name for name, number in Counter(name for state in states for name in state.whole).items() if number > 1]
    wrong += [f"{name} was trained whole by several adapters" for name in twice]
    if wrong:
        sources = ", ".join(state.source.path for state in states)
        raise AdapterFileError(f"{sources} cannot be merged into {base}: {'; '.join(wrong)}.")
    return updates, whole


def _fault(layer: str, update: Update, weight: Tensor | None) -> str | None:
    if weight is None:
        return f"there is no {layer}.weight"
    if weight.dim() != 2 or not weight.is_floating_point():
        return f"{layer}.weight is {weight.dtype} of shape {tuple(weight.shape)}, no matrix"
    out_features, in_features = weight.shape
    try:
        update.spec.check(out_features, in_features, layer)
    except SpecError as error:
        return str(error).rstrip(".")
    given, needed = tuple(update.theta.shape), update.spec.shape(out_features, in_features)
    if given != needed:
        return f"{layer}.weight {tuple(weight.shape)} needs {update.spec.variant} of shape {needed}, not {given}"
    return None


def _dtype(weight: Tensor, wanted: torch.dtype | str) -> torch.dtype:
    return wanted if isinstance(wanted, torch.dtype) and weight.is_floating_point() else weight.dtype


def _for_merge(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in a dtype that neither loses its digits nor rounds the result before the one that is asked for."""
    return weight if weight.dtype == dtype else weight.to(torch.promote_types(weight.dtype, torch.float32))


@torch.inference_mode()
def _certificate(
    path: Path,
    weights: dict[str, Tensor],
    updates: dict[str, list[Update]],
    whole: dict[str, Tensor],
    layouts: dict[str, Layout],
    tolerance: float | None,
) -> LayersCertificate:
    """The file, read back: merged weights against training's own way, all others bit by bit."""
    try:
        written = map_tensors(path)
    except BonetuneError as error:
        return LayersCertificate((), 0, (str(error),), tolerance)
    problems = [] if list(written) == list(weights) else ["other names than the base model's, or in another order"]
    checks: list[LayerCheck] = []
    unchanged = 0
    for name in weights.keys() & written.keys():
        got = written[name]
        if (got.shape, got.dtype) != layouts[name]:
            problems.append(f"{name} is {got.dtype} of shape {tuple(got.shape)}")
        elif name in updates:
            checks.append(_check(name, whole.get(name, weights[name]), updates[name], got))
        elif bits(got).equal(bits(whole.get(name, weights[name]).to(got.dtype))):
            unchanged += 1
        else:
            problems.append(f"{name} is not what it was to be")
    return LayersCertificate(tuple(sorted(checks, key=lambda check: check.name)), unchanged, tuple(sorted(problems)), tolerance)


def _check(name: str, weight: Tensor, updates: Sequence[Update], got: Tensor) -> LayerCheck:
    x = random_inputs(name, weight.shape[1]).to(torch.promote_types(weight.dtype, torch.float32))
    frozen = PlainWeight(weight.to(x.dtype))
    expected = adapted_linear(frozen, x, [update._replace(theta=update.theta.to(x.dtype)) for update in updates])
    return check_layer(name, expected, x @ got.to(x.dtype).T, got.dtype, frozen.product(x))
