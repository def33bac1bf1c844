"""Tasks on rows of any format that training takes: exact match, loss, and a classifier's scores."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch

from bonetune.data import PAPER_PROMPT, EncodedSet, Lengths, RowFormat, encode_rows
from bonetune.data.batches import padded
from bonetune.data.formats import Kind
from bonetune.data.preflight import check
from bonetune.errors import InputError
from bonetune.evaluation.ledger import Ledger
from bonetune.evaluation.result import Record, TaskResult
from bonetune.evaluation.statistics import Proportion, bootstrap, resampled
from bonetune.evaluation.task import Prepared, Request, Task, digest
from bonetune.evaluation.trained_with import TrainedWith
from bonetune.losses import check_loss, example_losses
from bonetune.metrics import agreement
from bonetune.models import Answer, Loaded, generate_batches

UNLIMITED = 1 << 30  # tokens
DEFAULT_NEW_TOKENS = 128
# How rows become prompts, which the protocols of tasks on rows name as it came about.
READING = ("dataset_field", "dataset_format", "prompt_template")


def exact_match(request: Request) -> Prepared:
    """Greedy answers that equal the expected ones, up to white space at both ends."""
    rows, row_format = read(request, "exact-match")
    most = request.max_new_tokens or DEFAULT_NEW_TOKENS

    def run(loaded: Loaded, ledger: Ledger) -> TaskResult:
        pairs = [row_format.question_and_answer(row, loaded.tokenizer) for row in rows]
        protocol = (
            f"exact-match: greedy, at most {most} new tokens; equal to the expected answer up to white space at both ends; "
            f"{read_as(rows[0], row_format, loaded.tokenizer)}"
        )
        batches = generate_batches(
            loaded.model,
            loaded.tokenizer,
            [question for question, _ in pairs],
            max_new_tokens=most,
            batch_size=request.batch_size,
            opened=row_format.is_conversation(rows[0]),
            done=[row - 1 for row in ledger.records],
        )
        for batch in batches:
            new = {number: answer for number, answer in batch.items() if number + 1 not in ledger.records}
            ledger.add([_matched(number, *pairs[number], answer) for number, answer in new.items()])
        records = ledger.ordered
        share = Proportion.of([record["correct"] for record in records])
        return TaskResult("exact-match", share.value, share.interval, share.total, records, cut_off(records), protocol)

    return Prepared(len(rows), _identity(request, rows, row_format) | {"max_new_tokens": most}, run, READING)


def _matched(number: int, prompt: str, expected: str, answer: Answer) -> Record:
    told = {"row": number + 1, "prompt": prompt, "output": answer.text, "complete": answer.complete}
    return told | {"expected": expected, "correct": answer.text.strip() == expected.strip()}


def cut_off(records: list[Record]) -> dict[str, float]:
    """How many answers reached the limit of their tokens, if any did."""
    count = sum(not record["complete"] for record in records)
    return {"cut_off": float(count)} if count else {}


def loss(request: Request) -> Prepared:
    """Mean cross-entropy of what training would supervise, in nats a token; long rows are cut as in the adapter's training."""
    rows, row_format = read(request, "loss")

    def run(loaded: Loaded, ledger: Ledger) -> TaskResult:
        examples, lengths, limit = _encoded(loaded, rows, row_format)
        told: dict[str, Any] = {"task_type": loaded.task_type, "kinds": [row_format.kind]}
        check(examples, loaded.tokenizer, lengths=lengths, max_length=limit, **told)
        ledger.count(len(rows) - len(set(examples.rows.tolist())))
        records = losses_of(loaded, examples, request.batch_size, ledger)
        return TaskResult(
            "loss",
            mean_loss(records),
            bootstrap(*weighted(records, [record["loss"] for record in records])),
            len(records),
            records,
            _cut(lengths),
            "loss: mean cross-entropy of the expected answers, in nats a token; interval: bootstrap over rows; "
            f"{read_as(rows[0], row_format, loaded.tokenizer)}",
            higher_is_better=False,
        )

    return Prepared(len(rows), _identity(request, rows, row_format), run, READING)


def losses_of(loaded: Loaded, examples: EncodedSet, batch_size: int, ledger: Ledger) -> list[Record]:
    """A record of each example: its row, its mean loss in nats a token, and how many tokens that is the mean of.

    Of a row that makes several examples (one cut into pieces), the record is that of all of them.
    """
    vocabulary = getattr(loaded.model.get_input_embeddings(), "num_embeddings", 0)
    if vocabulary:
        check_loss(loaded.model, vocabulary)
    counts = examples.labelled if loaded.task_type == "SEQ_2_SEQ_LM" else examples.supervised
    collate = padded(loaded.tokenizer.pad_token_id or 0)
    order = np.argsort(examples.lengths, kind="stable")
    sums = np.zeros(len(examples))
    remaining = Counter(examples.rows.tolist())
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        batch = collate([examples[int(number)] for number in numbers])
        sums[numbers] = example_losses(loaded.model, **_on(batch, loaded.model.device)).double().cpu().numpy()
        for row in examples.rows[numbers].tolist():
            remaining[row] -= 1
            ledger.count(not remaining[row])
    records = []
    for row in sorted(remaining):
        own = examples.rows == row
        tokens = int(counts[own].sum())
        records.append({"row": row, "loss": float(sums[own].sum()) / max(tokens, 1), "supervised_tokens": tokens})
    return records


def mean_loss(records: list[Record]) -> float:
    """Of all tokens, in nats a token."""
    total = sum(record["loss"] * record["supervised_tokens"] for record in records)
    return total / sum(record["supervised_tokens"] for record in records)


def weighted(records: list[Record], values: list[float]) -> tuple[list[float], list[float]]:
    """Sums and weights of which the ratio is the mean over all tokens."""
    weights = [float(record["supervised_tokens"]) for record in records]
    return [value * weight for value, weight in zip(values, weights, strict=True)], weights


def classification(request: Request, name: str = "classification", score: str | None = None) -> Prepared:
    """Accuracy of a classifier, or Pearson's correlation where it predicts numbers, and what training measures besides.

    Args:
        request: what is asked.
        name: of the task.
        score: another of those metrics to be the score.
    """
    rows, row_format = read(request, name)

    def run(loaded: Loaded, ledger: Ledger) -> TaskResult:
        classes = _classes(loaded.model.config)
        examples, lengths, _ = _encoded(loaded, rows, row_format, classes)
        ledger.count(len(rows) - len(examples))
        logits, labels = _judged(loaded, examples, request.batch_size, ledger)
        metrics = agreement(logits, labels)
        numbers = examples.rows.tolist()
        chosen = score or ("accuracy" if classes else "pearson")
        if chosen not in metrics:
            raise InputError(f"{name} is scored by {chosen}, which a model that predicts numbers does not have.")
        if classes:
            records = [
                {"row": number, "output": classes[a], "expected": classes[b], "correct": a == b}
                for number, a, b in zip(numbers, logits.argmax(-1).tolist(), labels.tolist(), strict=True)
            ]
        else:
            pairs = zip(numbers, logits[:, 0].tolist(), labels.tolist(), strict=True)
            records = [{"row": number, "output": a, "expected": b} for number, a, b in pairs]
        if chosen == "accuracy":
            interval = Proportion.of([record["correct"] for record in records]).interval
        else:
            interval = resampled(lambda drawn: agreement(logits[drawn], labels[drawn])[chosen], len(records))
        how = "Wilson's" if chosen == "accuracy" else "bootstrap over rows"
        value = metrics.pop(chosen)
        return TaskResult(
            name, value, interval, len(records), records, metrics | _cut(lengths), f"{name}: {chosen}; interval: {how}"
        )

    return Prepared(len(rows), _identity(request, rows, row_format), run)


@torch.inference_mode()
def _judged(loaded: Loaded, examples: EncodedSet, batch_size: int, ledger: Ledger) -> tuple[torch.Tensor, torch.Tensor]:
    """(examples, classes) float32 and (examples,): what the model answers, and what it should."""
    collate = padded(loaded.tokenizer.pad_token_id, pad_labels=False)
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    for start in range(0, len(examples), batch_size):
        batch = _on(collate(examples[start : start + batch_size]), loaded.model.device)
        labels = batch.pop("labels")
        parts.append((loaded.model(**batch).logits.float().cpu(), labels.cpu()))
        ledger.count(len(labels))
    logits, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return logits, labels


def read(request: Request, task: str) -> tuple[list[Record], RowFormat]:
    """The rows to score, each checked, and their format."""
    rows = request.rows(task)
    template = request.prompt_template or request.run.settings.get("prompt_template") or PAPER_PROMPT
    if request.dataset_field is None and request.dataset_format is None:
        row_format = request.run.row_format(rows[0], template, request.task_type)
    else:
        kind = cast(Kind, request.dataset_format or "auto")
        row_format = RowFormat.detect(rows[0], request.dataset_field, template, kind, request.task_type)
    for number, row in enumerate(rows, 1):
        row_format.check(row, number)
    return rows, row_format


def read_as(row: Record, row_format: RowFormat, tokenizer: Any) -> str:
    """In words, how rows become prompts: their format, and the template that they are put into, if they are."""
    fields = f"rows read as {row_format.kind} ({', '.join(row_format.fields)})"
    if row_format.is_conversation(row):
        return f"{fields}, put by the chat template {digest(tokenizer.chat_template)}"
    templated = row_format.kind in ("instruction", "alpaca")
    return f"{fields}, prompt template {row_format.template!r}" if templated else fields


def _identity(request: Request, rows: list[Record], row_format: RowFormat) -> dict[str, Any]:
    told = {"kind": row_format.kind, "fields": row_format.fields, "template": row_format.template}
    return {"rows": digest(rows), "read_as": told, "batch_size": request.batch_size}


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


def _classes(config: Any) -> tuple[str, ...]:
    """Names of a classifier's classes, numbers where it has none of its own; none of a regression."""
    if config.num_labels == 1:
        return ()
    names = tuple(config.id2label[number] for number in range(config.num_labels))
    unnamed = all(name == f"LABEL_{number}" for number, name in enumerate(names))
    return tuple(str(number) for number in range(config.num_labels)) if unnamed else names


def _on(batch: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}


TASKS = (
    Task("exact-match", exact_match, heeds=READING),
    Task("loss", loss, heeds=READING),
    Task("classification", classification, ("SEQ_CLS",), READING[:2]),
)
