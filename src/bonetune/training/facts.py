"""A run in a few lines: what was trained on what, for how long, and what came of it."""

import math
from typing import Any

from bonetune.training.baselines import method_in_words
from bonetune.training.plots import Points, mean_window, points, running_mean
from bonetune.training.run_record import RunRecord

Fact = tuple[str, str]


def facts(record: RunRecord) -> list[Fact]:
    """Name and value of what a run's files say about it, as texts. What they do not say is left out."""
    return [*_trained(record), *_spent(record), *results(record)]


def results(record: RunRecord) -> list[Fact]:
    """Losses and evaluations, from the first to the last."""
    found = [("Training loss", _from_to(record.losses))] if record.losses else []
    if (window := mean_window(len(record.losses))) > 1:
        found.append((f"Mean of the last {window} values", number(running_mean(record.losses, window)[-1][1])))
    return found + [(metric_name(name), _from_to(values)) for name, values in record.evaluations.items()]


def loss_unit(record: RunRecord) -> str | None:
    """What losses are measured in; None for classifiers, whose loss depends on what their labels are."""
    return None if record.settings.get("task_type") == "SEQ_CLS" else "nats a supervised token"


def metric_name(name: str) -> str:
    """`eval_loss` as "Evaluation loss"; other metrics without the prefix."""
    words = name.removeprefix("eval_").replace("_", " ")
    return f"Evaluation {words}" if words == "loss" else f"{words[:1].upper()}{words[1:]}"


def number(value: Any) -> str:
    """A number for people: whole ones with commas, others with four digits."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if math.isfinite(value) else "not finite"


def _trained(record: RunRecord) -> list[Fact]:
    summary, found = record.outline, []
    if "base" in summary:
        found.append(("Base model", str(summary["base"])))
    if record.baseline:
        kwargs = record.settings.get("baseline_kwargs") or {}
        found.append(("Method", method_in_words(record.baseline, summary.get("r"), kwargs).replace("=", " = ")))
    elif "variant" in summary:
        found.append(("Adapter", f"{summary['variant']}, r = {summary['r']}" if "r" in summary else str(summary["variant"])))
    if "trainable_parameters" in summary:
        trainable, total = summary["trainable_parameters"], summary.get("total_parameters")
        share = f" ({100 * trainable / total:.2f}% of {total:,})" if total else ""
        found.append(("Trainable parameters", f"{trainable:,}{share}"))
    if record.datasets:
        found.append(("Data", ", ".join(record.datasets)))
    if "examples" in summary:
        longest = f", the longest of {summary['longest']:,} tokens" if "longest" in summary else ""
        found.append(("Examples", f"{summary['examples']:,}{longest}"))
    if "tokens" in summary:
        supervised = f", {summary['supervised']:,} of them supervised" if "supervised" in summary else ""
        found.append(("Tokens of the data", f"{summary['tokens']:,}{supervised}"))
    return found


def _spent(record: RunRecord) -> list[Fact]:
    summary, found = record.outline, []
    if "steps" in summary:
        epoch = record.latest("epoch")
        epochs = "" if epoch is None else f" ({epoch:.3g} epochs)"
        found.append(("Optimizer steps", f"{summary['steps']:,}{epochs}"))
    if "seconds" in summary:
        found.append(("Time", _duration(summary["seconds"])))
    if record.baseline and "init_seconds" in summary:
        found.append(("Time of the initialization", _duration(summary["init_seconds"])))
    tokens, padded = record.latest("tokens"), record.latest("padded_tokens")
    if tokens:
        padding = f", and {100 * (1 - tokens / padded):.1f}% padding" if padded else ""
        found.append(("Tokens trained on", f"{tokens:,}{padding}"))
    if rates := _finite(points(record.metrics, "learning_rate")):
        found.append(("Highest learning rate", f"{max(rates):.4g}"))
    if memory := _finite(points(record.metrics, "memory_bytes")):
        found.append(("Highest memory", f"{max(memory) / 2**30:.2f} GiB"))
    return found


def _from_to(values: Points) -> str:
    first, last = number(values[0][1]), number(values[-1][1])
    return last if len(values) == 1 else f"{first} → {last}"


def _finite(values: Points) -> list[float]:
    return [value for _, value in values if math.isfinite(value)]


def _duration(seconds: float) -> str:
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {left} s" if minutes else f"{seconds:.1f} s"
