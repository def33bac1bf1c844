"""Which member of the Bone family an adapter is, and what shape its tensor has on a given weight.

A frozen weight W (out, in) is cut into shards of width r: column shards `b = 0..in/r-1`, row blocks `a = 0..out/r-1`, square
blocks `W[a, b]` (r, r). Each variant shares one trainable tensor between them (arXiv 2409.15371):

| variant    | tensor                  | updated weight                                                       |
|------------|-------------------------|----------------------------------------------------------------------|
| `bone`     | D (r, out)              | `W'[o, b*r + j] = W[o, b*r + j] + D[j, o]`                            |
| `mini`     | D (r, mini_r)           | `bone` with D repeated out / mini_r times along out                  |
| `bat`      | B (out/r, r, r)         | `W'[a, b] = W[a, b] + W[a, b] @ B[a] + B[a]`                          |
| `bat-row`  | B (in/r, r, r)          | `W'[a, b] = W[a, b] + W[a, b] @ B[b] + B[b]`                          |
| `bat-free` | B (1, r, r)             | `W'[a, b] = W[a, b] + W[a, b] @ B[0] + B[0]`                          |
| `bat-left` | B (out/r, r, r)         | `W'[a, b] = W[a, b] + B[a].T @ W[a, b] + B[a].T`                      |

Two of these tensors can have the same shape and mean different functions, so a shape never tells the variant.
"""

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, cast, get_args

from bonetune.errors import InputError, SpecError

Variant = Literal["bone", "mini", "bat", "bat-row", "bat-free", "bat-left"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)


def parse_variant(name: str) -> Variant:
    """Return `name` as a `Variant`. Raises `InputError` with the nearest known name."""
    if name in VARIANTS:
        return cast(Variant, name)
    near = difflib.get_close_matches(str(name), VARIANTS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise InputError(f"Unknown variant {name!r}: choose one of {', '.join(VARIANTS)}.{hint}")


@dataclass(frozen=True)
class ShardSpec:
    """A variant with its sizes: all that is needed to know an adapter tensor's shape and meaning.

    Args:
        variant: a member of the family.
        r: shard size, which PEFT calls rank.
        mini_r: width of D for `mini`; not used by the other variants.

    Raises:
        InputError: unknown variant, or a size that is not a positive integer.
    """

    variant: Variant = "bone"
    r: int = 64
    mini_r: int = 1

    def __post_init__(self) -> None:
        parse_variant(self.variant)
        for name in ("r", "mini_r"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
                raise InputError(f"`{name}` should be a positive integer, got {value!r}.")

    @property
    def blockwise(self) -> bool:
        """Whether the update depends on the frozen weight (the BAT variants)."""
        return self.variant not in ("bone", "mini")

    def check(self, out_features: int, in_features: int, where: str = "this weight") -> None:
        """Raise if the variant cannot be defined on a weight of shape (out_features, in_features).

        Raises:
            SpecError: it cannot; the message names `where`, the sizes and the values of r (or mini_r) that would work.
        """
        r, shape = self.r, f"({out_features}, {in_features})"
        if r > in_features:
            raise SpecError(
                f"`r` ({r}) must be less than or equal to in_features ({in_features}) of {where}, shape {shape}. "
                f"Use {self.remedy([(out_features, in_features)])}."
            )
        if self.variant == "mini" and out_features % self.mini_r:
            raise SpecError(
                f"`mini_r` ({self.mini_r}) must divide out_features ({out_features}) of {where}, shape {shape}. "
                f"Use {self.remedy([(out_features, in_features)])}."
            )
        if self.blockwise and (in_features % r or out_features % r):
            raise SpecError(
                f"Variant {self.variant!r} needs `r` to divide both sides of the weight, but r={r} does not divide "
                f"{where}, shape {shape}. Use {self.remedy([(out_features, in_features)])}, or variant='bone'."
            )

    def nearest_r(self, shapes: Iterable[tuple[int, int]]) -> int:
        """The r nearest to `self.r` that this variant allows on every weight of `shapes`, each (out, in)."""
        shapes = list(shapes)
        if self.blockwise:
            return _nearest_divisor(math.gcd(*(side for shape in shapes for side in shape)), self.r)
        return min(self.r, *(in_features for _, in_features in shapes))

    def remedy(self, shapes: Iterable[tuple[int, int]]) -> str:
        """The setting nearest to this one that fits every weight of `shapes`, each (out, in): "r=48", or "mini_r=2"."""
        shapes = list(shapes)
        r = f"r={self.nearest_r(shapes)}"
        if self.variant != "mini":
            return r
        mini_r = f"mini_r={_nearest_divisor(math.gcd(*(out_features for out_features, _ in shapes)), self.mini_r)}"
        return mini_r if all(self.r <= in_features for _, in_features in shapes) else f"{r}, {mini_r}"

    def shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """Shape of the trainable tensor on a weight of shape (out_features, in_features); see the module's table."""
        r = self.r
        match self.variant:
            case "bone":
                return (r, out_features)
            case "mini":
                return (r, self.mini_r)
            case "bat-row":
                return (in_features // r, r, r)
            case "bat-free":
                return (1, r, r)
            case _:
                return (out_features // r, r, r)


def _nearest_divisor(number: int, wanted: int) -> int:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: (abs(d - wanted), d))
