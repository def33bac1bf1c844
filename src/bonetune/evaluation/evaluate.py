"""`bonetune eval`: tasks on a file of rows, each with a score, its interval and a record for every item."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch

from bonetune.data import PAPER_PROMPT, EncodedSet, Lengths, RowFormat, encode_rows, read_rows
from bonetune.data.batches import padded
from bonetune.data.formats import Kind
from bonetune.data.preflight import check
from bonetune.errors import InputError
from bonetune.evaluation.statistics import Proportion
from bonetune.evaluation.trained_with import TrainedWith
from bonetune.files import usable_folder, write_json, write_json_lines
from bonetune.losses import check_loss, completion_loss
from bonetune.metrics import agreement
from bonetune.models import Loaded, generate, load_model, task_type_of

Record = dict[str, Any]
UNLIMITED = 1 << 30  # tokens


@dataclass(frozen=True)
class TaskResult:
    """One task's outcome.

    Args:
        task: its name.
        score: exact match or accuracy in [0, 1], mean loss in nats a token, or Pearson's correlation.
        interval: 95% interval of a share; None for others.
        items: how many items were scored.
        records: one entry an item.
        metrics: further numbers, by name; `truncated` and `dropped`: rows that were cut or left out, as in training.
    """

    task: str
    score: float
    interval: tuple[float, float] | None
    items: int
    records: list[Record]
    metrics: dict[str, float] = field(default_factory=dict)

    def summary(self) -> Record:
        """Everything but the records, as JSON writes it."""
        numbers = {"task": self.task, "score": self.score, "interval": self.interval, "items": self.items}
        return numbers | ({"metrics": self.metrics} if self.metrics else {})


def evaluate(
    model: str | Loaded,
    tasks: Sequence[str],
    *,
    data: str,
    limit: int | None = None,
    output_dir: str | None = None,
    base: str | None = None,
    dtype: str = "auto",
    dataset_field: Sequence[str] | None = None,
    dataset_format: str | None = None,
    prompt_template: str | None = None,
    dataset_split: str = "test",
    batch_size: int = 32,
    max_new_tokens: int = 128,
    trust_remote_code: bool = False,
    on_items: Callable[[str, int, int], None] | None = None,
) -> list[TaskResult]:
    """Score a model, or an adapter on its base model.

    Args:
        model: a model or adapter as `bonetune.models.load_model` takes it, or one already loaded.
        tasks: names out of `TASKS`: `exact-match` (greedy answers equal to the expected ones up to white space at both
            ends), `loss` (mean cross-entropy of the expected answers); for classifiers `classification` (accuracy, or
            Pearson's correlation where numbers are predicted, and what training measures besides). The last two cut long rows
            as the adapter's training did.
        data: a file of rows or a data set of the hub, in any format that training takes.
        limit: score the first so many rows.
        output_dir: where to write `TASK.jsonl` (records) and `scores.json`.
        base: the adapter's base model, if it is not where the adapter says.
        dtype: of the model's weights.
        dataset_field: names of the fields, in the order that `RowFormat` describes.
        dataset_format: how rows are read, or `auto`. Where neither this nor `dataset_field` is given, rows that fit are read
            as those that the adapter was trained on.
        prompt_template: with `{instruction}` in it; None takes the one the adapter was trained with, else the papers'.
        dataset_split: split of a data set of the hub.
        batch_size: rows at a time.
        max_new_tokens: longest answer.
        trust_remote_code: run code that comes with the model or the adapter.
        on_items: called with task, rows done, rows in all.

    Raises:
        InputError: unknown task or format, or one that the model is not for, bad limit, unreadable data or model.

    Example:
        >>> bonetune.evaluate("runs/first", ["exact-match"], data="test.jsonl")
    """
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks:
        raise InputError(f"Unknown task {', '.join(map(repr, unknown)) or '(none)'}: choose from {', '.join(TASKS)}.")
    if dataset_format not in (None, "auto", *get_args(Kind)):
        raise InputError(f"Unknown dataset_format {dataset_format!r}: choose from auto, {', '.join(get_args(Kind))}.")
    if limit is not None and limit <= 0:
        raise InputError(f"limit should be a positive number of rows, got {limit}.")
    if output_dir is not None:
        usable_folder(Path(output_dir), "output_dir")
    task_type = model.task_type if isinstance(model, Loaded) else task_type_of(model)
    unfit = [task for task in tasks if (task == "classification") != (task_type == "SEQ_CLS")]
    if unfit:
        fit = "classification" if task_type == "SEQ_CLS" else "exact-match, loss"
        raise InputError(f"{', '.join(unfit)} is not for a model of task type {task_type}: choose from {fit}.")
    rows = read_rows(data, dataset_split)[:limit]
    run = TrainedWith.of(model.adapter if isinstance(model, Loaded) else model)
    template = prompt_template or run.settings.get("prompt_template") or PAPER_PROMPT
    if dataset_field is None and dataset_format is None:
        row_format = run.row_format(rows[0], template, task_type)
    else:
        row_format = RowFormat.detect(rows[0], dataset_field, template, cast(Kind, dataset_format or "auto"), task_type)
    for number, row in enumerate(rows, 1):
        row_format.check(row, number)
    loaded = load_model(model, dtype, base, trust_remote_code=trust_remote_code) if isinstance(model, str) else model
    results = []
    for task in tasks:
        done = _counter(task, len(rows), on_items)
        results.append(TASKS[task](loaded, rows, row_format, batch_size, max_new_tokens, done))
        if output_dir is not None:
            write_json_lines(Path(output_dir) / f"{task}.jsonl", results[-1].records)
    if output_dir is not None:
        write_json(Path(output_dir) / "scores.json", [result.summary() for result in results])
    return results


def _counter(task: str, total: int, on_items: Callable[[str, int, int], None] | None) -> Callable[[int], None]:
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        if on_items is not None:
            on_items(task, done, total)

    return count


def _exact_match(
    loaded: Loaded, rows: list[Record], row_format: RowFormat, batch_size: int, max_new_tokens: int, done: Callable[[int], None]
) -> TaskResult:
    pairs = [row_format.question_and_answer(row, loaded.tokenizer) for row in rows]
    outputs = generate(
        loaded.model,
        loaded.tokenizer,
        [question for question, _ in pairs],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        opened=row_format.is_conversation(rows[0]),
        on_batch=done,
    )
    records = [
        {"prompt": question, "output": output, "expected": answer, "correct": output.strip() == answer.strip()}
        for (question, answer), output in zip(pairs, outputs, strict=True)
    ]
    share = Proportion.of([record["correct"] for record in records])
    return TaskResult("exact-match", share.value, share.interval, share.total, records)


@torch.inference_mode()
def _loss(
    loaded: Loaded, rows: list[Record], row_format: RowFormat, batch_size: int, max_new_tokens: int, done: Callable[[int], None]
) -> TaskResult:
    examples, lengths, limit = _encoded(loaded, rows, row_format)
    told: dict[str, Any] = {"task_type": loaded.task_type, "kinds": [row_format.kind]}
    check(examples, loaded.tokenizer, lengths=lengths, max_length=limit, **told)
    vocabulary = getattr(loaded.model.get_input_embeddings(), "num_embeddings", 0)
    if vocabulary:
        check_loss(loaded.model, vocabulary)
    supervised = examples.labelled if loaded.task_type == "SEQ_2_SEQ_LM" else examples.supervised
    records: list[Record] = []
    scored = 0
    for example, count in zip(examples, supervised.tolist(), strict=True):
        batch = {name: tensor.to(loaded.model.device) for name, tensor in padded(0)([example]).items()}
        mean = completion_loss(loaded.model, **batch).item()
        records.append({"row": example.row, "loss": mean, "supervised_tokens": count})
        done(example.row - scored)
        scored = example.row
    done(len(rows) - scored)
    total = sum(record["loss"] * record["supervised_tokens"] for record in records)
    return TaskResult("loss", total / int(supervised.sum()), None, len(records), records, _cut(lengths))


def _encoded(
    loaded: Loaded, rows: list[Record], row_format: RowFormat, classes: tuple[str, ...] = ()
) -> tuple[EncodedSet, Lengths, int]:
    """The rows as the adapter's run would have made examples of them, and the largest number of tokens of one.

    A run that refused long rows has seen none: those are then whole, as far as the model takes them.
    """
    settings = TrainedWith.of(loaded.adapter).settings
    room = getattr(loaded.model.config, "max_position_embeddings", None) or UNLIMITED
    truncation = settings.get("truncation", "error")
    limit = room if truncation == "error" else min(room, settings["max_length"])
    told: dict[str, Any] = {"task_type": loaded.task_type, "classes": classes}
    if truncation in ("left", "right") or (truncation == "split" and row_format.is_plain):
        return *encode_rows(rows, row_format, loaded.tokenizer, limit, truncation, **told), limit
    examples, lengths = encode_rows(rows, row_format, loaded.tokenizer, UNLIMITED, **told)
    fits = np.maximum(examples.lengths, examples.labelled) <= limit
    long = int((~fits).sum())
    if long and (truncation != "drop" or not fits.any()):
        name = loaded.adapter or loaded.base
        raise InputError(
            f"{long} of {len(rows)} rows are longer than the {limit} tokens that {name} takes, the longest {lengths.longest}: "
            "take them out of the data."
        )
    examples = examples.take(np.flatnonzero(fits))
    return examples, Lengths.of(examples, loaded.task_type, dropped=long, empty=lengths.empty), limit


def _cut(lengths: Lengths) -> dict[str, float]:
    counts = {"truncated": lengths.truncated, "dropped": lengths.dropped}
    return {name: float(count) for name, count in counts.items() if count}


@torch.inference_mode()
def _classification(
    loaded: Loaded, rows: list[Record], row_format: RowFormat, batch_size: int, max_new_tokens: int, done: Callable[[int], None]
) -> TaskResult:
    classes = _classes(loaded.model.config)
    examples, lengths, _ = _encoded(loaded, rows, row_format, classes)
    collate = padded(loaded.tokenizer.pad_token_id, pad_labels=False)
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    done(len(rows) - len(examples))
    for start in range(0, len(examples), batch_size):
        batch = {name: tensor.to(loaded.model.device) for name, tensor in collate(examples[start : start + batch_size]).items()}
        labels = batch.pop("labels")
        parts.append((loaded.model(**batch).logits.float().cpu(), labels.cpu()))
        done(len(labels))
    logits, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    metrics = agreement(logits, labels) | _cut(lengths)
    numbers = examples.rows.tolist()
    if not classes:
        pairs = zip(numbers, logits[:, 0].tolist(), labels.tolist(), strict=True)
        records = [{"row": number, "output": a, "expected": b} for number, a, b in pairs]
        return TaskResult("classification", metrics.pop("pearson"), None, len(records), records, metrics)
    answers = logits.argmax(-1)
    records = [
        {"row": number, "output": classes[a], "expected": classes[b], "correct": a == b}
        for number, a, b in zip(numbers, answers.tolist(), labels.tolist(), strict=True)
    ]
    share = Proportion.of([record["correct"] for record in records])
    del metrics["accuracy"]
    return TaskResult("classification", share.value, share.interval, share.total, records, metrics)


def _classes(config: Any) -> tuple[str, ...]:
    """Names of a classifier's classes, numbers where it has none of its own; none of a regression."""
    if config.num_labels == 1:
        return ()
    names = tuple(config.id2label[number] for number in range(config.num_labels))
    unnamed = all(name == f"LABEL_{number}" for number, name in enumerate(names))
    return tuple(str(number) for number in range(config.num_labels)) if unnamed else names


TASKS: dict[str, Callable[..., TaskResult]] = {
    "exact-match": _exact_match,
    "loss": _loss,
    "classification": _classification,
}
