"""`bonetune eval`: tasks on a file of rows, each with a score, its interval and a record for every item."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from bonetune.data import PAPER_PROMPT, RowFormat, collate, encode_rows, read_rows
from bonetune.errors import InputError
from bonetune.evaluation.generation import generate
from bonetune.evaluation.statistics import Proportion
from bonetune.files import RUN_FILE, usable_folder, write_json, write_json_lines
from bonetune.losses import completion_loss
from bonetune.models import Loaded, load_model

Record = dict[str, Any]


@dataclass(frozen=True)
class TaskResult:
    """One task's outcome.

    Args:
        task: its name.
        score: exact match in [0, 1], or mean loss in nats a token.
        interval: 95% interval of an exact match; None for a loss.
        items: how many items were scored.
        records: one entry an item.
    """

    task: str
    score: float
    interval: tuple[float, float] | None
    items: int
    records: list[Record]

    def summary(self) -> Record:
        """Everything but the records, as JSON writes it."""
        return {"task": self.task, "score": self.score, "interval": self.interval, "items": self.items}


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
    prompt_template: str | None = None,
    dataset_split: str = "test",
    batch_size: int = 32,
    max_new_tokens: int = 128,
    on_items: Callable[[str, int, int], None] | None = None,
) -> list[TaskResult]:
    """Score a model, or an adapter on its base model.

    Args:
        model: a model or adapter as `bonetune.models.load_model` takes it, or one already loaded.
        tasks: names out of `TASKS`: `exact-match` (greedy answers equal to the expected ones up to white space at both
            ends), `loss` (mean cross-entropy of the expected answers).
        data: a file of rows or a data set of the hub, in any format that training takes.
        limit: score the first so many rows.
        output_dir: where to write `TASK.jsonl` (records) and `scores.json`.
        base: the adapter's base model, if it is not where the adapter says.
        dtype: of the model's weights.
        dataset_field: question's and answer's field, for instruction data; None takes those the adapter was trained with.
        prompt_template: with `{instruction}` in it; None takes the one the adapter was trained with, else the papers'.
        dataset_split: split of a data set of the hub.
        batch_size: rows at a time.
        max_new_tokens: longest answer.
        on_items: called with task, rows done, rows in all.

    Raises:
        InputError: unknown task, bad limit, unreadable data or model.

    Example:
        >>> bonetune.evaluate("runs/first", ["exact-match"], data="test.jsonl")
    """
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks:
        raise InputError(f"Unknown task {', '.join(map(repr, unknown)) or '(none)'}: choose from {', '.join(TASKS)}.")
    if limit is not None and limit <= 0:
        raise InputError(f"limit should be a positive number of rows, got {limit}.")
    if output_dir is not None:
        usable_folder(Path(output_dir), "output_dir")
    rows = read_rows(data, dataset_split)[:limit]
    trained_with = _trained_with(model) if isinstance(model, str) else {}
    template = prompt_template or trained_with.get("prompt_template") or PAPER_PROMPT
    fields = trained_with.get("dataset_field")
    if dataset_field is None and fields and set(fields) <= set(rows[0]):
        dataset_field = fields
    row_format = RowFormat.detect(rows[0], dataset_field, template)
    for number, row in enumerate(rows, 1):
        row_format.check(row, number)
    loaded = load_model(model, dtype, base) if isinstance(model, str) else model
    results = []
    for task in tasks:
        done = _counter(task, len(rows), on_items)
        results.append(TASKS[task](loaded, rows, row_format, batch_size, max_new_tokens, done))
        if output_dir is not None:
            write_json_lines(Path(output_dir) / f"{task}.jsonl", results[-1].records)
    if output_dir is not None:
        write_json(Path(output_dir) / "scores.json", [result.summary() for result in results])
    return results


def _trained_with(model: str) -> dict[str, Any]:
    """The settings of the run that made an adapter, from the run.yaml beside it."""
    file = Path(model) / RUN_FILE
    return yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}


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
    limit = getattr(loaded.model.config, "max_position_embeddings", None) or 1 << 30
    examples, lengths = encode_rows(rows, row_format, loaded.tokenizer, max_length=limit)
    records: list[Record] = []
    for example in examples:
        batch = {name: tensor.to(loaded.model.device) for name, tensor in collate(0)([example]).items()}
        mean = completion_loss(loaded.model, **batch).item()
        records.append({"loss": mean, "supervised_tokens": example.supervised})
        done(1)
    total = sum(record["loss"] * record["supervised_tokens"] for record in records)
    return TaskResult("loss", total / lengths.supervised, None, len(records), records)


TASKS: dict[str, Callable[..., TaskResult]] = {"exact-match": _exact_match, "loss": _loss}
