"""Several streams as one."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def interleaved(
    streams: Sequence[Callable[[], Iterator[T]]], weights: Sequence[float] | None = None
) -> Iterator[tuple[int, T]]:
    """Items of all streams by turns, each with its stream's number.

    Without weights, each stream is gone through once, and those that last longer go on by themselves. With weights, after any
    number of items each stream has given its share of them, up to less than one (Balinski and Young's quota method); a stream
    that is through begins again until each was gone through once. No chance is involved.

    Args:
        streams: functions that open each; with weights, none may be empty.
        weights: positive, one for each.
    """
    opened = [stream() for stream in streams]
    given, through = [0] * len(streams), [False] * len(streams)
    while True:
        turn = _by_turns(given, through) if weights is None else _by_shares(given, weights)
        item = next(opened[turn], None)
        if item is None:
            through[turn] = True
            if all(through):
                return
            if weights is not None:
                opened[turn] = streams[turn]()
            continue
        given[turn] += 1
        yield turn, item


def _by_turns(given: Sequence[int], through: Sequence[bool]) -> int:
    return min((n for n in range(len(given)) if not through[n]), key=lambda n: (given[n], n))


def _by_shares(given: Sequence[int], weights: Sequence[float]) -> int:
    """The stream that needs its next item soonest, of those that would not have more than their share by it."""
    shares = [weight / sum(weights) for weight in weights]
    due = [n for n, share in enumerate(shares) if given[n] < (sum(given) + 1) * share]
    return min(due, key=lambda n: ((given[n] + 1) / shares[n], n))
