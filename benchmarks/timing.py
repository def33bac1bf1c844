"""The timing loop: all steps in one process, round by round, so that drift hits all alike; and ratios within a round."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

# A sample shorter than this is mostly the clock's own grain: kernels add up a process's threads in ticks of milliseconds.
SHORTEST_SAMPLE = 0.15

Step = Callable[[], object]
Sample = Callable[[Step, int], float]


@dataclass(frozen=True)
class Ratio:
    """Median, lowest and highest of the ratios of the rounds."""

    median: float
    lowest: float
    highest: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.lowest:.2f}, {self.highest:.2f}]"


def cpu_seconds(step: Step, calls: int) -> float:
    """CPU seconds, of all threads of this process, that so many calls take."""
    began = time.process_time()
    for _ in range(calls):
        step()
    return time.process_time() - began


def interleaved(
    steps: Mapping[str, Step], rounds: int, shortest: float = SHORTEST_SAMPLE, sample: Sample = cpu_seconds
) -> dict[str, list[float]]:
    """Seconds that one call of each step takes: one sample a step and round.

    Args:
        steps: what to time, by name. Each is called at least once before the first round.
        rounds: samples of each step. Every round begins one step later than the round before.
        shortest: seconds that a sample lasts at least. Each step is called as often as that needs, a number that is
            found before the first round and is a power of two; a sample counts divided by it. 0: one call is one sample.
        sample: takes a step and a number of calls, makes them, and returns their seconds.
    """
    names = list(steps)
    calls = {name: _calls(steps[name], shortest, sample) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(sample(steps[name], calls[name]) / calls[name])
    return seconds


def ratio(seconds: Sequence[float], reference: Sequence[float]) -> Ratio:
    """Seconds over reference, round by round."""
    ratios = [mine / other for mine, other in zip(seconds, reference, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def _calls(step: Step, shortest: float, sample: Sample) -> int:
    step()  # the first call prepares what later ones find: kernels, buffers
    calls = 1
    while shortest and sample(step, calls) < shortest:
        calls *= 2
    return calls
