"""Whether an adapter that was written in another format is the adapter it was made of."""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bonetune.formats import AdapterState, Fitted
from bonetune.ops import PlainWeight, adapted_linear

# Rows of random numbers that a layer's update is compared on.
_ROWS = 16
# How far the products of factors may be from the update, as a share of it, by the dtype that they were rounded to.
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# The same where singular values were cut away.
TRUNCATION = 0.1


@dataclass(frozen=True)
class TensorsCertificate:
    """Whether a file, read back, gives the adapter's own tensors.

    Args:
        tensors: how many were compared.
        different: names of those that differ in a bit, are missing, too many, or mean something else.
    """

    tensors: int
    different: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether all of them are equal."""
        return not self.different

    def to_dict(self) -> dict[str, Any]:
        """As certificate.json holds it."""
        return {"method": "tensors"} | asdict(self) | {"holds": self.holds}

    def __str__(self) -> str:
        if self.holds:
            return f"equal: read back, all {self.tensors} tensors have the same bits and the same meaning"
        return f"NOT equal: {len(self.different)} of {self.tensors} tensors differ, {self.different[0]} for one"


@dataclass(frozen=True)
class UpdatesCertificate:
    """How far the updates of a file, read back, are from the adapter's.

    Args:
        errors: ||got - expected|| / ||expected|| of each layer's update on random inputs, by its name; where singular values
            were cut, the exact share that was lost, if that is more.
        tolerance: what each of them may be.
        different: names of tensors trained whole that are missing, too many, or differ in a bit.
    """

    errors: dict[str, float]
    tolerance: float
    different: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether every layer's error is within the tolerance, and the whole tensors are there."""
        return self.errors[self.worst] <= self.tolerance and not self.different

    @property
    def worst(self) -> str:
        """The layer with the largest error."""
        return max(self.errors, key=lambda layer: self.errors[layer])

    def to_dict(self) -> dict[str, Any]:
        """As certificate.json holds it."""
        largest = {"worst_layer": self.worst, "largest_error": self.errors[self.worst]}
        return {"method": "layers"} | largest | asdict(self) | {"holds": self.holds}

    def __str__(self) -> str:
        verdict = "equal" if self.holds else "NOT equal"
        lost = f"; {len(self.different)} tensors trained whole differ, {self.different[0]} for one" if self.different else ""
        return (
            f"{verdict} within {self.tolerance:.2g}: the updates of {len(self.errors)} layers differ by at most "
            f"{self.errors[self.worst]:.2g} of their size, in {self.worst}{lost}"
        )


@dataclass(frozen=True)
class WeightsCertificate:
    """Whether a file holds a model's weights.

    Args:
        weights: how many were compared.
        different: names of those that are not the model's, rounded to the file's numbers.
        coding_error: the largest error of a quantized weight, as a share of it; 0 if none is.
    """

    weights: int
    different: tuple[str, ...]
    coding_error: float = 0.0

    @property
    def holds(self) -> bool:
        """Whether all of them are."""
        return not self.different

    def to_dict(self) -> dict[str, Any]:
        """As certificate.json holds it."""
        return {"method": "weights"} | asdict(self) | {"holds": self.holds}

    def __str__(self) -> str:
        coded = f", quantized ones within {self.coding_error:.2g} of their size" if self.coding_error else ""
        if self.holds:
            return f"equal: read back, all {self.weights} weights are the model's, rounded once{coded}"
        return f"NOT equal: {len(self.different)} of {self.weights} weights differ, {self.different[0]} for one"


def same_tensors(expected: AdapterState, got: AdapterState) -> TensorsCertificate:
    """Compare two adapters bit by bit, and what their tensors mean."""
    names = sorted(expected.tensors.keys() | got.tensors.keys())
    meaning = [name for name in names if expected.spec(name) != got.spec(name)]
    different = {*_different(expected.tensors, got.tensors), *meaning, *_different(expected.whole, got.whole)}
    return TensorsCertificate(len(expected.tensors) + len(expected.whole), tuple(sorted(different)))


def same_updates(
    fitted: Fitted,
    update: Callable[[str, Tensor], Tensor],
    whole: Mapping[str, Tensor],
    tolerance: float,
    known: Mapping[str, float] | None = None,
) -> UpdatesCertificate:
    """Compare each layer's update on random inputs, in float64, with what training computes.

    Args:
        fitted: the adapter on its base model.
        update: (layer, x (n, in)) to x Delta^T (n, out), or (number, n, out), of what was written, in float64.
        whole: the tensors trained whole, of what was written.
        tolerance: of the certificate.
        known: errors that are known exactly.
    """
    errors = {layer: max(_error(fitted, layer, update), (known or {}).get(layer, 0.0)) for layer in fitted}
    return UpdatesCertificate(errors, tolerance, tuple(_different(fitted.state.whole, whole)))


def _error(fitted: Fitted, layer: str, update: Callable[[str, Tensor], Tensor]) -> float:
    bone, own = fitted.layers[layer], fitted.update(layer)
    generator = torch.Generator().manual_seed(zlib.crc32(layer.encode()))
    x = torch.randn(_ROWS, bone.in_features, generator=generator, dtype=torch.float64)
    number = bone.number_of_matrices
    if own.spec.blockwise:
        W = bone.matrices(fitted.weight(layer)).double()
    else:  # the update does not depend on it
        W = x.new_zeros(1).expand(*[] if number is None else [number], bone.out_features, bone.in_features)
    theta = own.theta.double()
    pairs = [(W, theta)] if number is None else zip(W, theta, strict=True)
    expected = [adapted_linear(PlainWeight(w), x, [own._replace(theta=t)]) - x @ w.T for w, t in pairs]
    wanted = expected[0] if number is None else torch.stack(expected)
    off, size = float((update(layer, x) - wanted).norm()), float(wanted.norm())
    return off / size if size else float(off > 0)


def _different(expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> list[str]:
    def same(name: str) -> bool:
        a, b = expected.get(name), got.get(name)
        return a is not None and b is not None and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)

    return [name for name in sorted(expected.keys() | got.keys()) if not same(name)]
