"""What a run shows while it goes and leaves behind: progress, metrics.jsonl, loss.png."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from bonetune.files import read_json_lines, write_json_lines


@dataclass(frozen=True)
class Progress:
    """Where a run stands."""

    step: int
    steps: int
    loss: float
    tokens_per_second: float
    seconds_left: float


class Recorder(TrainerCallback):
    """Appends each logged step to metrics.jsonl and tells `on_progress`.

    Args:
        path: metrics.jsonl; on resuming, lines of steps to be repeated are dropped.
        tokens_seen: returns the number of tokens trained on in this process.
        on_progress: called at each logged step.
    """

    def __init__(self, path: Path, tokens_seen: Callable[[], int], on_progress: Callable[[Progress], None] | None) -> None:
        self.path, self.tokens_seen, self.on_progress = path, tokens_seen, on_progress
        self.began = 0.0
        self.first_step = 0
        self.before: dict[str, Any] = {"seconds": 0.0, "tokens": 0}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began, self.first_step = time.perf_counter(), state.global_step
        kept = [line for line in read_metrics(self.path) if line["step"] <= state.global_step] if self.first_step else []
        self.before = kept[-1] if kept else self.before
        write_json_lines(self.path, kept)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or not ("loss" in logs or "eval_loss" in logs):
            return
        seconds = time.perf_counter() - self.began
        kept = {key: logs[key] for key in ("loss", "grad_norm", "learning_rate", "eval_loss") if key in logs}
        line = {
            "step": state.global_step,
            "epoch": state.epoch,
            "seconds": round(self.before["seconds"] + seconds, 3),
            "tokens": self.before["tokens"] + self.tokens_seen(),
            **kept,
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        done = state.global_step - self.first_step
        if self.on_progress is not None and "loss" in logs and done:
            left = (state.max_steps - state.global_step) * seconds / done
            rate = self.tokens_seen() / seconds
            self.on_progress(Progress(state.global_step, state.max_steps, float(logs["loss"]), rate, left))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; none if there is no such file."""
    return read_json_lines(path) if path.is_file() else []


def plot_loss(metrics: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw the loss of each step, its running mean, and evaluation losses, to a PNG file."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    trained = [(line["step"], line["loss"]) for line in metrics if "loss" in line]
    evaluated = [(line["step"], line["eval_loss"]) for line in metrics if "eval_loss" in line]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    if trained:
        steps, losses = zip(*trained, strict=True)
        window = max(1, len(losses) // 8)
        means = [sum(losses[max(0, i - window + 1) : i + 1]) / min(window, i + 1) for i in range(len(losses))]
        axes.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=1, label="training loss of each step")
        axes.plot(steps, means, color="tab:blue", linewidth=2, label=f"mean of the last {window}" if window > 1 else None)
    if evaluated:
        axes.plot(*zip(*evaluated, strict=True), "o-", color="tab:orange", label="evaluation loss")
    axes.set(title=title, xlabel="optimizer step", ylabel="loss (nats a supervised token)", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
