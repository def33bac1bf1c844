"""What a run shows while it goes and leaves behind: progress, metrics.jsonl."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bonetune.diagnostics import peak_memory
from bonetune.files import read_json_lines, write_json_lines


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Args:
        step, steps: optimizer steps done, and of the whole run.
        loss: of the last logged steps.
        tokens_per_second: tokens of examples, since this process began to train.
        padded_tokens_per_second: the same with padding.
        seconds_left: until the last step.
        memory_bytes: the most that this process has held: on the GPU if it has one, else in memory.
    """

    step: int
    steps: int
    loss: float
    tokens_per_second: float
    padded_tokens_per_second: float
    seconds_left: float
    memory_bytes: int


@dataclass
class Tally:
    """What a run has done so far; it travels with each checkpoint, so that a resumed run counts on.

    Args:
        seconds: of training.
        tokens: without padding.
        padded_tokens: with padding.
        losses: of the steps since the last logged one.
    """

    seconds: float = 0.0
    tokens: int = 0
    padded_tokens: int = 0
    losses: list[float] = field(default_factory=list)


class Recorder:
    """Writes metrics.jsonl and tells `on_progress`.

    Args:
        path: metrics.jsonl.
        steps: optimizer steps of the whole run.
        on_progress: called for each line with a training loss.
    """

    def __init__(self, path: Path, steps: int, on_progress: Callable[[Progress], None] | None) -> None:
        self.path, self.steps, self.on_progress = path, steps, on_progress
        self.tally = Tally()
        self._began = time.perf_counter()
        self._before = Tally()
        self._first_step = 0

    def begin(self, step: int, tally: Tally | None = None) -> None:
        """Start counting at `step`, on top of `tally`; lines of later steps are dropped, for they will come again."""
        self.tally = tally or Tally()
        self._before = Tally(**asdict(self.tally))
        self._first_step = step
        self.start_clock()
        write_json_lines(self.path, [line for line in read_metrics(self.path) if line["step"] <= step] if tally else [])

    def start_clock(self) -> None:
        """Count seconds from now on."""
        self._began = time.perf_counter()

    def count(self, loss: float, tokens: int, padded_tokens: int) -> None:
        """Add one optimizer step."""
        self.tally.losses.append(loss)
        self.tally.tokens += tokens
        self.tally.padded_tokens += padded_tokens
        self.tally.seconds = self._before.seconds + time.perf_counter() - self._began

    def log(self, step: int, epoch: float, **measured: float) -> dict[str, float]:
        """Write a line for the steps counted since the last one, with their mean loss, and return it."""
        tally = self.tally
        loss = sum(tally.losses) / len(tally.losses)
        tally.losses = []
        line = {
            "step": step,
            "epoch": epoch,
            "seconds": round(tally.seconds, 3),
            "tokens": tally.tokens,
            "padded_tokens": tally.padded_tokens,
            "loss": loss,
            **measured,
            "memory_bytes": peak_memory(),
        }
        self.write(line)
        if self.on_progress is not None:
            seconds = tally.seconds - self._before.seconds
            self.on_progress(
                Progress(
                    step=step,
                    steps=self.steps,
                    loss=loss,
                    tokens_per_second=(tally.tokens - self._before.tokens) / seconds,
                    padded_tokens_per_second=(tally.padded_tokens - self._before.padded_tokens) / seconds,
                    seconds_left=(self.steps - step) * seconds / (step - self._first_step),
                    memory_bytes=line["memory_bytes"],
                )
            )
        return line

    def write(self, line: dict[str, Any]) -> None:
        """Append a line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; none if there is no such file."""
    return read_json_lines(path) if path.is_file() else []
