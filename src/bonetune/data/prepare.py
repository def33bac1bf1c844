"""From the settings of a run to checked examples."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from bonetune.data.encoding import COUNTS, Lengths, Truncation
from bonetune.data.examples import EncodedSet
from bonetune.data.formats import PAPER_PROMPT, Kind, RowFormat, TaskName
from bonetune.data.holding_out import hold_out
from bonetune.data.preflight import Finding, check
from bonetune.data.reading import read_rows
from bonetune.data.sources import Encode, classes_of, detected, prompts_of, source_names
from bonetune.errors import InputError


@dataclass(frozen=True)
class Prepared:
    """Data that a run can start on.

    Args:
        train: the training examples.
        evaluation: the held-out ones, if any.
        sources: (examples,), the number of the data set that each training example is from.
        lengths: of the training examples.
        findings: what is worth a warning.
        prompts: question and expected answer, or text and label, of some training rows; none for plain text.
        opened: whether a chat template made the prompts.
        row_formats: of each data set.
        classes: a classifier's, none for regression; None for other tasks.
    """

    train: EncodedSet
    evaluation: EncodedSet | None
    sources: np.ndarray
    lengths: Lengths
    findings: tuple[Finding, ...]
    prompts: list[tuple[str, str]]
    opened: bool
    row_formats: tuple[RowFormat, ...]
    classes: tuple[str, ...] | None


def prepare(
    tokenizer: Any,
    *,
    dataset_name: str | Sequence[str],
    dataset_split: str = "train",
    dataset_weights: Sequence[float] | None = None,
    dataset_format: Kind | Literal["auto"] = "auto",
    dataset_field: Sequence[str] | None = None,
    prompt_template: str = PAPER_PROMPT,
    completion_only_loss: bool = True,
    eval_dataset_name: str | None = None,
    eval_dataset_split: str = "test",
    eval_size: float | None = None,
    max_length: int = 1024,
    truncation: Truncation = "error",
    cache_tokens: bool = True,
    seed: int = 0,
    task_type: TaskName = "CAUSAL_LM",
    num_labels: int | None = None,
    kept_prompts: int = 16,
) -> Prepared:
    """Read, encode and check the data of a run.

    Args:
        tokenizer: the model's.
        dataset_name: a file, an id on the hub, or several, each read in its own format.
        dataset_split: split or slice of each.
        dataset_weights: one for each data set; checked here, and heeded where batches are planned.
        dataset_format: the format of all, or `auto`.
        dataset_field: names of the fields, in all.
        prompt_template: of instructions.
        completion_only_loss: whether prompts are masked.
        eval_dataset_name: held-out rows.
        eval_dataset_split: split or slice of them.
        eval_size: instead, hold out this share (below 1) or number of `dataset_name`'s rows, chosen by `seed`. Rows equal
            to one of them leave the training data, too.
        max_length: tokens of the longest example.
        truncation: what becomes of longer ones.
        cache_tokens: whether tokens are kept for the next run.
        seed: of what is held out.
        task_type: what the model is for.
        num_labels: a classifier's number of classes, 1 for regression; None: as the labels are.
        kept_prompts: how many prompts to return.

    Raises:
        InputError: data that cannot be read, encoded or learned from.
    """
    told = {"dataset_field": dataset_field, "template": prompt_template, "kind": dataset_format, "task_type": task_type}
    names = source_names(dataset_name, dataset_weights)
    if eval_dataset_name is not None and eval_size is not None:
        raise InputError("Both eval_dataset_name and eval_size are set: hold rows out, or name those that are held out.")
    data = [(name, read_rows(name, dataset_split)) for name in names]
    formats = tuple(detected(name, rows[0], told) for name, rows in data)
    settings: dict[str, Any] = {
        "max_length": max_length,
        "truncation": truncation,
        "completion_only_loss": completion_only_loss,
        "task_type": task_type,
        "classes": classes_of(data, formats, num_labels),
    }

    encode = Encode(tokenizer, cache_tokens, settings)
    parts = [encode(name, rows, row_format) for (name, rows), row_format in zip(data, formats, strict=True)]
    train = EncodedSet.joined([examples for examples, _ in parts])
    sources = np.repeat(np.arange(len(parts)), [len(examples) for examples, _ in parts])
    evaluation, findings = None, []
    if eval_dataset_name is not None:
        held_out = read_rows(eval_dataset_name, eval_dataset_split)
        evaluation, _ = encode(eval_dataset_name, held_out, detected(eval_dataset_name, held_out[0], told))
    elif eval_size is not None:
        kept, chosen, copies = hold_out(train, sources, eval_size, seed)
        train, evaluation, sources = train.take(kept), train.take(chosen), sources[kept]
        if copies:
            message = f"{copies} training rows equal held-out ones and were left out."
            findings.append(Finding("copies-of-held-out", "warning", message))
        if dataset_weights is not None:
            _check_none_is_empty(names, sources, eval_size)
    counts: dict[str, int] = {name: sum(getattr(part, name) for _, part in parts) for name in COUNTS}
    lengths = Lengths.of(train, task_type, **counts)
    findings += check(
        train,
        tokenizer,
        lengths=lengths,
        max_length=max_length,
        task_type=task_type,
        evaluation=evaluation,
        classes=settings["classes"],
        sources=sources,
        names=names,
        kinds=[row_format.kind for row_format in formats],
    )
    return Prepared(
        train=train,
        evaluation=evaluation,
        sources=sources,
        lengths=lengths,
        findings=tuple(findings),
        prompts=prompts_of(train.rows, sources, [rows for _, rows in data], formats, tokenizer, kept_prompts),
        opened=formats[0].is_conversation(data[0][1][0]),
        row_formats=formats,
        classes=settings["classes"] if task_type == "SEQ_CLS" else None,
    )


def _check_none_is_empty(names: Sequence[str], sources: np.ndarray, eval_size: float) -> None:
    empty = [name for number, name in enumerate(names) if not (sources == number).any()]
    if empty:
        raise InputError(
            f"eval_size={eval_size:g} leaves no row of {', '.join(empty)} to train on, which dataset_weights asks for: "
            "hold out fewer rows, or name an eval_dataset_name."
        )
