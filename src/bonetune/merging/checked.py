"""The files of a streamed merge, read back: changed weights against what training computes, all others byte by byte."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bonetune.certificates import LayerCheck, LayersCertificate, check_layer, random_inputs
from bonetune.formats.checkpoint import DTYPES, Stored, read_header
from bonetune.merging.plan import Change, Output, Plan
from bonetune.merging.streamed import WHOLE, Job, frozen_rows, lies_as_its_matrix, read_rows
from bonetune.merging.structure import misfits
from bonetune.ops import Update, adapted_linear, row_pieces
from bonetune.ops.column import column_product
from bonetune.ops.lookup import looked_up
from bonetune.ops.pieces import for_rows
from bonetune.spec import ShardSpec
from bonetune.tuner import BoneEmbedding

# Rows of an embedding that are looked up.
_LOOKED_UP = 512
_PIECE_ELEMENTS = 1 << 20


class Checks:
    """Comparisons of the files of a plan, as they come.

    What is expected of a changed layer is computed by `bonetune.ops`' fast forms, which training uses, from the base model's
    file; the formula by which it was merged has no part in it, and where its tensor belongs is asked of the merged model itself
    (`structure.misfits`).

    Args:
        plan: what was to be written.
        folder: where it was.
    """

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder = plan, folder
        self._checks: list[LayerCheck] = []
        self._problems: list[str] = []
        self._unchanged: list[str] = []

    def jobs(self, file: str) -> list[Job]:
        """The comparisons of one file."""
        header, outs = read_header(self.folder / file), {out.name: out for out in self.plan.files[file]}
        self._problems += [f"{name} is missing from {file}" for name in outs.keys() - header.tensors.keys()]
        self._problems += [f"{name} in {file} is nothing of the model's" for name in header.tensors.keys() - outs.keys()]
        if header.metadata != self.plan.checkpoint.headers[file].metadata:
            self._problems.append(f"{file} has other metadata than the base model's")
        found = [(out, header.tensors[name]) for name, out in outs.items() if name in header.tensors]
        return [lambda out=out, written=written: self._compare(file, out, written) for out, written in found]

    def certificate(self, tolerance: float | None) -> LayersCertificate:
        """What was found, in the order of the names, and what the finished folder lacks as a model."""
        checks = tuple(sorted(self._checks, key=lambda check: check.name))
        problems = (*sorted(self._problems), *misfits(self.plan, self.folder))
        return LayersCertificate(checks, len(self._unchanged), problems, tolerance)

    def _compare(self, file: str, out: Output, written: Stored) -> None:
        if (DTYPES[written.dtype], written.shape) != (out.dtype, out.source.shape):
            self._problems.append(f"{out.name} is {written.dtype} of shape {written.shape}")
            return
        source, target = (os.open(folder / file, os.O_RDONLY) for folder in (self.plan.checkpoint.folder, self.folder))
        try:
            if out.change is not None and out.change.updates:
                self._checks.append(_check(out, out.change, source, target, written))
            elif _same(out, source, target, written):
                self._unchanged.append(out.name)
            else:
                self._problems.append(f"{out.name} is not what it was to be")
        finally:
            os.close(source)
            os.close(target)


@torch.inference_mode()
def _check(out: Output, change: Change, source: int, target: int, written: Stored) -> LayerCheck:
    def before(rows: slice) -> Tensor:
        return frozen_rows(source, out.source, change, rows)

    def after(rows: slice) -> Tensor:
        return read_rows(target, written, rows)

    assert change.bone is not None
    if isinstance(change.bone, BoneEmbedding):
        expected, got, without = _looked_up(out, change, before, after)
    else:
        expected, got, without = _multiplied(out, change, before, after)
    return check_layer(out.name, expected, got, out.dtype, without)


Rows = Callable[[slice], Tensor]


def _multiplied(out: Output, change: Change, before: Rows, after: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (n, out) as training computes them, from the written weight, and without updates; of stacked matrices, all."""
    bone, everything = change.bone, slice(0, out.source.shape[0])
    assert bone is not None
    x = random_inputs(out.name, bone.in_features)
    x = x.double() if DTYPES[out.source.dtype] == torch.float64 else x
    if lies_as_its_matrix(bone, out.source.shape):
        frozen, merged = _Rows(before, *out.source.shape), _Rows(after, *out.source.shape)
        return _adapted(frozen, change.updates, x), merged.product(x), frozen.product(x)
    stacked = bone.number_of_matrices is not None

    def matrices(rows: Rows) -> list[_Rows]:
        whole = bone.matrices(rows(everything))
        return [_Rows(W.__getitem__, *W.shape) for W in (whole if stacked else whole.unsqueeze(0))]

    with WHOLE:  # which one weight after the other is
        frozen = matrices(before)
        without = torch.cat([W.product(x) for W in frozen], -1)
        updates = [[u._replace(theta=u.theta[n]) if stacked else u for u in change.updates] for n in range(len(frozen))]
        expected = torch.cat([_adapted(*pair, x) for pair in zip(frozen, updates, strict=True)], -1)
        del frozen
        got = torch.cat([W.product(x) for W in matrices(after)], -1)
    return expected, got, without


def _adapted(frozen: "_Rows", updates: Sequence[Update], x: Tensor) -> Tensor:
    """What training computes. `bat` asks for the whole weight, and is given some rows of it at a time."""
    whole = [update for update in updates if update.spec.variant == "bat"]
    y = adapted_linear(frozen, x, [update for update in updates if update.spec.variant != "bat"])
    if not whole:
        return y
    added = [
        column_product(x, W, None, [for_rows(update, rows) for update in whole], with_weight=False)
        for rows, W in frozen.pieces(x.dtype, [update.spec for update in whole])
    ]
    return y + torch.cat(added, -1)


def _looked_up(out: Output, change: Change, before: Rows, after: Rows) -> tuple[Tensor, Tensor, Tensor]:
    number, dim = out.source.shape
    ids = torch.randint(number, (min(number, _LOOKED_UP),), generator=torch.Generator().manual_seed(0)).unique()
    wide = torch.promote_types(DTYPES[out.source.dtype], torch.float32)
    without, got = (torch.cat([rows(slice(i, i + 1)) for i in ids.tolist()]).to(wide) for rows in (before, after))
    unread = torch.empty(1, dtype=wide).expand(number, dim)  # of which only the shape counts
    expected = sum((looked_up(ids, unread, update) for update in change.updates if not update.spec.blockwise), without)
    for update in change.updates:
        if update.spec.blockwise:
            r, added = update.spec.r, []
            for start in (r * (ids // r).unique()).tolist():
                block = slice(start, start + r)
                own = ids[(ids >= block.start) & (ids < block.stop)] - start
                added.append(looked_up(own, before(block).to(wide), for_rows(update, block)))
            expected = expected + torch.cat(added)
    return expected, got, without


class _Rows:
    """A frozen weight (out, in) that is read a few rows at a time: an `ops.FrozenLinear`."""

    stored, bias, plain = False, None, False

    def __init__(self, rows: Rows, out_features: int, in_features: int) -> None:
        self._rows, self._shape = rows, (out_features, in_features)
        self._last: tuple[Tensor, Tensor] | None = None

    def product(self, x: Tensor) -> Tensor:
        if self._last is None or self._last[0] is not x:
            self._last = x, torch.cat([x @ W.T for _, W in self.pieces(x.dtype)], -1)
        return self._last[1].clone()

    __call__ = product

    def weight(self) -> Tensor:
        """Never held whole: only `bat` would ask for it, which `_adapted` compares in bands."""
        raise AssertionError("a weight that is read a few rows at a time was asked for whole: take its pieces")

    def pieces(self, dtype: torch.dtype, specs: Sequence[ShardSpec] = ()) -> Iterator[tuple[slice, Tensor]]:
        for rows in row_pieces(*self._shape, specs, _PIECE_ELEMENTS):
            W = self._rows(rows)
            yield rows, W.to(torch.promote_types(W.dtype, dtype))


def _same(out: Output, source: int, target: int, written: Stored) -> bool:
    shape = out.source.shape
    number, width = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
    for rows in row_pieces(number, width, [], _PIECE_ELEMENTS):
        expected = frozen_rows(source, out.source, out.change or Change(), rows).to(out.dtype)
        if not torch.equal(bits(expected), bits(read_rows(target, written, rows))):
            return False
    return True


def bits(tensor: Tensor) -> Tensor:
    """Bytes, in which NaN equals itself."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
