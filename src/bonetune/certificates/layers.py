"""Whether written weights are what training computes: each layer, alone, on random inputs."""

import math
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# By how much of the outputs a layer's outputs may differ, in root mean square. Rounding weights once to these dtypes moves
# them by at most 0.58 of 2^-11 (float16) and 2^-8 (bfloat16); in float32 and float64, the order of sums counts for more.
LAYER_TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 2**-11, "bfloat16": 2**-8}
# Share of the update that the written weights may lack, or have too much, over all layers: without it they lack all.
MAX_SHARE_LOST = 0.5
# Part of the outputs below which what an update changes is the rounding of float32: adapters that cancel leave that much.
_NO_EFFECT = 1e-6


@dataclass(frozen=True)
class LayerCheck:
    """One layer: how far its outputs are from those that training computes.

    Args:
        name: the layer's.
        error: root mean square of the differences over that of the expected outputs; infinite if either is not finite.
        dtype: of the written weight.
        effect: root mean square of what the update changes, over the same; None if that was not given.
        kept: the part of that change that is in the written weight: 1 is all, 0 nothing; None as `effect`, or without one.
        size: root mean square of the expected outputs.
    """

    name: str
    error: float
    dtype: str
    effect: float | None = None
    kept: float | None = None
    size: float = math.nan


@dataclass(frozen=True)
class LayersCertificate:
    """Layers of a written model against what training computes for them.

    Args:
        checks: each layer that was compared.
        unchanged: number of tensors that were compared byte by byte with the base model's, or with what was to replace them.
        problems: what is wrong besides: tensors that differ, are missing or that nothing explains.
        tolerance: for every layer, in place of `LAYER_TOLERANCE`.
    """

    checks: tuple[LayerCheck, ...]
    unchanged: int = 0
    problems: tuple[str, ...] = ()
    tolerance: float | None = None

    @property
    def worst(self) -> LayerCheck | None:
        """The layer whose error is the largest part of what it may be."""
        return max(self.checks, key=lambda check: check.error / self._allowed(check), default=None)

    @property
    def update_kept(self) -> float | None:
        """The part of the update that is in the written weights, all layers together, each in relation to its outputs."""
        known = [(check.effect, check.kept) for check in self.checks if check.effect is not None and check.kept is not None]
        total = math.fsum(effect**2 for effect, _ in known)
        return math.fsum(effect**2 * kept for effect, kept in known) / total if total else None

    @property
    def holds(self) -> bool:
        """Whether no layer differs by more than its tolerance, the update is there, and nothing else is wrong.

        Nothing is shown by layers of which all outputs are zero.
        """
        alive = not self.checks or any(check.size != 0 for check in self.checks)
        near = all(check.error <= self._allowed(check) for check in self.checks)
        there = self.update_kept is None or abs(1 - self.update_kept) <= MAX_SHARE_LOST
        return alive and near and there and not self.problems

    def to_dict(self) -> dict[str, Any]:
        """As certificate.json holds it."""
        worst = self.worst
        return {
            "method": "layers",
            "holds": self.holds,
            "tolerance": self._stated_tolerance(),
            "dtype": ", ".join(sorted({check.dtype for check in self.checks})),
            "worst_layer": None if worst is None else worst.name,
            "largest_error": None if worst is None else worst.error,
            "update_kept": self.update_kept,
            "unchanged": self.unchanged,
            "problems": [*self.problems],
            "layers": {check.name: check.error for check in self.checks},
        }

    def __str__(self) -> str:
        verdict = "equal up to rounding" if self.holds else "NOT equal up to rounding"
        worst = self.worst
        errors = "" if worst is None else f": outputs of {worst.name} differ most, by {worst.error:.2g} ({worst.dtype})"
        kept = "" if self.update_kept is None else f"; {100 * self.update_kept:.1f}% of the update is in the weights"
        wrong = f"; {'; '.join(self.problems[:3])} ({len(self.problems)} such)" if self.problems else ""
        unchanged = f"; {self.unchanged} tensors as they were" if self.unchanged else ""
        return f"{verdict}, layer by layer, in {len(self.checks)} layers{errors}{kept}{unchanged}{wrong}"

    def _allowed(self, check: LayerCheck) -> float:
        return LAYER_TOLERANCE[check.dtype] if self.tolerance is None else self.tolerance

    def _stated_tolerance(self) -> float | dict[str, float]:
        if self.tolerance is not None:
            return self.tolerance
        return {dtype: LAYER_TOLERANCE[dtype] for dtype in sorted({check.dtype for check in self.checks})}


def check_layer(
    name: str, expected: Tensor, got: Tensor, dtype: torch.dtype | str, without: Tensor | None = None
) -> LayerCheck:
    """Compare a layer's outputs.

    Args:
        name: the layer's.
        expected: (n, out), what training computes, in float32 at least.
        got: (n, out), from the written weights.
        dtype: of the written weights, to which they were rounded.
        without: (n, out), without the update.
    """
    expected, got = expected.double(), got.double()
    short = str(dtype).removeprefix("torch.")
    size = _rms(expected)
    if not math.isfinite(size) or not math.isfinite(_rms(got)):
        return LayerCheck(name, math.inf, short)
    error = _relative(_rms(got - expected), size)
    if without is None:
        return LayerCheck(name, error, short, size=size)
    change, found = expected - without.double(), got - without.double()
    effect = _relative(_rms(change), size)
    kept = ((found * change).sum() / change.square().sum()).item() if effect > _NO_EFFECT else None
    return LayerCheck(name, error, short, effect, kept, size)


def random_inputs(name: str, features: int, number: int = 8) -> Tensor:
    """Inputs (number, features) for a layer, float32: the same for the same name."""
    return torch.randn(number, features, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def _rms(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item() if tensor.numel() else 0.0


def _relative(value: float, size: float) -> float:
    return value / size if size else (math.inf if value else 0.0)
