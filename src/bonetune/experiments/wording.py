"""Numbers as people read them."""

import math
from collections.abc import Sequence

from bonetune.experiments.findings import Interval, Kind

NONE = "-"
_FORM: dict[Kind, tuple[float, str]] = {"share": (100, ".1f"), "loss": (1, ".4f"), "rise": (1, ".4f"), "number": (1, ".4g")}
_UNIT: dict[Kind, str] = {"share": "%", "loss": "nats a token", "rise": "nats a token", "number": ""}


def unit(kind: Kind, *, difference: bool = False) -> str:
    """What a score, or a difference of two, is counted in."""
    return "points" if difference and kind == "share" else _UNIT[kind]


def score_text(value: float | None, kind: Kind, *, signed: bool = False) -> str:
    """A score without its unit; shares in percent. A rise has its sign always."""
    if value is None:
        return NONE
    factor, form = _FORM[kind]
    return f"{factor * value:{'+' if signed or kind == 'rise' else ''}z{form}}"


def interval_text(interval: Interval | None, kind: Kind, *, signed: bool = False) -> str:
    """[low, high], without the unit."""
    return NONE if interval is None else f"[{', '.join(score_text(end, kind, signed=signed) for end in interval)}]"


def rate_text(rate: float | None) -> str:
    """A learning rate: 2e-3."""
    if rate is None:
        return NONE
    mantissa, exponent = f"{rate:.3e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def p_text(p: float | None) -> str:
    """A probability."""
    if p is None:
        return NONE
    return "<0.0001" if p < 1e-4 else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"


def seconds_text(seconds: float | None) -> str:
    """A duration."""
    if seconds is None:
        return NONE
    if seconds >= 120:
        hours, left = divmod(round(seconds), 3600)
        minutes, rest = divmod(left, 60)
        return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
    return f"{seconds:.3g} s" if seconds >= 1 or seconds == 0 else f"{1000 * seconds:.3g} ms"


def bytes_text(number: int | None) -> str:
    """A size in KiB, MiB or GiB."""
    if number is None:
        return NONE
    if number < 2**20:
        return f"{number / 2**10:.1f} KiB"
    return f"{number / 2**30:.2f} GiB" if number >= 2**29 else f"{number / 2**20:.1f} MiB"


def count_text(number: int | None) -> str:
    """A whole number with commas."""
    return NONE if number is None else f"{number:,}"


def quoted(name: str) -> str:
    """A name as it stands in a sentence."""
    return f"`{name.replace('`', chr(39))}`"


def listed(words: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def ratio_text(value: float) -> str:
    """How many times."""
    return f"{value:.2f}" if math.isfinite(value) else NONE
