"""`bonetune eval`: tasks by name, each with a score, its interval, the protocol's full name and a record for every item."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from bonetune.data.formats import Kind, TaskName
from bonetune.errors import InputError
from bonetune.evaluation import glue, gsm8k, harness, humaneval, mathematics, mt_bench, rows, texts
from bonetune.evaluation.ledger import Ledger, Shelf
from bonetune.evaluation.result import TaskResult
from bonetune.evaluation.task import Judge, Prepared, Request, Task
from bonetune.evaluation.trained_with import TrainedWith
from bonetune.files import read_config, usable_folder, write_json
from bonetune.formats.checkpoint import fingerprint_of
from bonetune.formats.tensors import ADAPTER_CONFIG, ADAPTER_FILES, sha256
from bonetune.models import Loaded, load_model, task_type_of

SCORES_FILE = "scores.json"
TASKS: dict[str, Task] = {
    task.name: task for room in (rows, texts, gsm8k, mathematics, humaneval, glue, mt_bench) for task in room.TASKS
}


def evaluate(
    model: str | Loaded,
    tasks: Sequence[str],
    *,
    data: str | Mapping[str, str] | None = None,
    limit: int | None = None,
    output_dir: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    base: str | None = None,
    dtype: str = "auto",
    dataset_field: Sequence[str] | None = None,
    dataset_format: str | None = None,
    prompt_template: str | None = None,
    dataset_split: str | None = None,
    few_shot: str | None = None,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    judge: Judge | None = None,
    unsafe_code: bool = False,
    trust_remote_code: bool = False,
    on_items: Callable[[str, int, int], None] | None = None,
) -> list[TaskResult]:
    """Score a model, or an adapter on its base model.

    Args:
        model: a model or adapter as `bonetune.models.load_model` takes it, or one already loaded.
        tasks: names out of `TASKS`, or `lm-eval:NAME`, any task of lm-evaluation-harness. docs/evaluation.md tells of each.
            On rows in any format that training takes: `exact-match`, `loss`, and for classifiers `classification` (the last
            two cut long rows as the adapter's training did). On plain text: `perplexity`, `forgetting`. Benchmarks under
            their protocols' names, such as `gsm8k:strict`.
        data: a file of rows or a data set of the hub, for all tasks or by task; None takes the protocol's own from the hub.
        limit: score the first so many rows.
        output_dir: where to write `TASK.jsonl` (records), `TASK.json` (score and settings) and `scores.json`.
        resume: go on with what is in `output_dir`: generated answers batch by batch, other tasks one by one. Scores are those
            of an evaluation that was not interrupted.
        overwrite: replace what is in `output_dir`.
        base: the adapter's base model, if it is not where the adapter says; for `forgetting`, the base of a model that has no
            adapter.
        dtype: of the model's weights.
        dataset_field: names of the fields, in the order that `RowFormat` describes.
        dataset_format: how rows are read, or `auto`. Where neither this nor `dataset_field` is given, rows that fit are read
            as those that the adapter was trained on.
        prompt_template: with `{instruction}` in it; None takes the protocol's, else the one the adapter was trained with, else
            the papers'.
        dataset_split: split of a data set of the hub, or a slice of any; None: the protocol's, else test.
        few_shot: the file or data set from which examples are shown, where the protocol shows some.
        batch_size: rows at a time.
        max_new_tokens: longest answer; None: the protocol's, else 128.
        judge: who grades the answers of `mt-bench`.
        unsafe_code: run the programs that a model writes even on a system that cannot hold them back.
        trust_remote_code: run code that comes with the model or the adapter.
        on_items: called with task, items done, items in all.

    Raises:
        InputError: unknown task or format, or one that the model is not for, bad limit, unreadable data or model, or an
            `output_dir` with records in it and neither `resume` nor `overwrite`.

    Example:
        >>> bonetune.evaluate("runs/first", ["gsm8k:strict"], data="gsm8k/test.jsonl", output_dir="scores")
    """
    for name in tasks:
        _task(name)  # a name that is none is told of before the model is looked for
    if output_dir is not None:
        usable_folder(Path(output_dir), "output_dir")
    adapted = isinstance(model, str) and (Path(model) / ADAPTER_CONFIG).is_file()
    if base is not None and not adapted and "forgetting" not in tasks:
        raise InputError(f"{model} is not an adapter folder (no {ADAPTER_CONFIG} in it), so it takes no base model.")
    prepared = prepare(
        tasks,
        data,
        limit=limit,
        task_type=model.task_type if isinstance(model, Loaded) else task_type_of(model),
        run=TrainedWith.of(model.adapter if isinstance(model, Loaded) else model),
        base=base,
        dataset_field=dataset_field,
        dataset_format=dataset_format,
        prompt_template=prompt_template,
        dataset_split=dataset_split,
        few_shot=few_shot,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        judge=judge,
        unsafe_code=unsafe_code,
        options={"dtype": dtype, "trust_remote_code": trust_remote_code},
    )
    asked = _asked(data, dataset_split, limit, few_shot, dataset_format, dataset_field, prompt_template)
    shelves = _shelves(model, base, dtype, prepared, output_dir)
    for shelf in shelves.values():
        shelf.claim(resume=resume, overwrite=overwrite)
    finished = {name: result for name, shelf in shelves.items() if (result := shelf.result) is not None}
    results: list[TaskResult] = []
    named = _name_of(model)
    loaded = model if isinstance(model, Loaded) else None
    for name, one in prepared.items():
        if name not in finished and loaded is None:
            loaded = load_model(str(model), dtype, base if adapted else None, trust_remote_code=trust_remote_code)
        told = partial(on_items, name) if on_items is not None else None
        results.append(finished[name] if name in finished else _run(one, loaded, shelves.get(name), told, asked(name)))
        if output_dir is not None:
            _write_scores(Path(output_dir) / SCORES_FILE, results, {"model": named, "dtype": dtype})
    return results


def prepare(
    tasks: Sequence[str],
    data: str | Mapping[str, str] | None = None,
    *,
    task_type: TaskName,
    run: TrainedWith,
    limit: int | None = None,
    dataset_field: Sequence[str] | None = None,
    dataset_format: str | None = None,
    dataset_split: str | None = None,
    **more: Any,
) -> dict[str, Prepared]:
    """Find the tasks and read and check their data, before a model is loaded.

    Args:
        tasks, data, limit, dataset_field, dataset_format, dataset_split: as for `evaluate`.
        task_type: what the model is for.
        run: what its adapter was trained with.
        more: further fields of `Request`.

    Raises:
        InputError: as `evaluate`.
    """
    chosen = [_task(name) for name in tasks]
    if not chosen:
        raise InputError(f"Unknown task (none): choose from {', '.join(TASKS)}.")
    if dataset_format not in (None, "auto", *get_args(Kind)):
        raise InputError(f"Unknown dataset_format {dataset_format!r}: choose from auto, {', '.join(get_args(Kind))}.")
    if limit is not None and limit <= 0:
        raise InputError(f"limit should be a positive number of rows, got {limit}.")
    if isinstance(data, Mapping) and (extra := sorted(set(data) - set(tasks))):
        raise InputError(f"data names {extra[0]!r}, which is not among the tasks {', '.join(tasks)}.")
    for task in chosen:
        if task_type not in task.task_types:
            fit = ", ".join(other.name for other in TASKS.values() if task_type in other.task_types)
            raise InputError(f"{task.name} is not for a model of task type {task_type}: choose from {fit}.")
    request = Request(
        split=dataset_split,
        limit=limit,
        task_type=task_type,
        run=run,
        dataset_field=tuple(dataset_field) if dataset_field is not None else None,
        dataset_format=dataset_format,
        **more,
    )
    return {
        task.name: task.prepare(replace(request, data=data.get(task.name) if isinstance(data, Mapping) else data))
        for task in chosen
    }


def _task(name: str) -> Task:
    if name.startswith(harness.PREFIX):
        return harness.task(name)
    if name not in TASKS:
        raise InputError(f"Unknown task {name!r}: choose from {', '.join(TASKS)}, or {harness.PREFIX}NAME.")
    return TASKS[name]


def _asked(
    data: str | Mapping[str, str] | None,
    split: str | None,
    limit: int | None,
    few_shot: str | None,
    dataset_format: str | None,
    dataset_field: Sequence[str] | None,
    template: str | None,
) -> Callable[[str], str]:
    """What the user has chosen otherwise than the protocol has it, and the version, in words, by task."""

    def told(task: str) -> str:
        source = data.get(task) if isinstance(data, Mapping) else data
        chosen = {
            "rows of": _named(source),
            "split": split,
            "the first": limit,
            "examples of": _named(few_shot),
            "read as": dataset_format,
            "fields": None if dataset_field is None else ", ".join(dataset_field),
            "prompt template": None if template is None else repr(template),
        }
        parts = [f"{name} {value}" for name, value in chosen.items() if value is not None]
        return "; ".join([*parts, f"bonetune {version('bonetune')}"])

    return told


def _named(source: str | None) -> str | None:
    """A file by its name alone, a data set by all of it."""
    is_file = source is not None and (Path(source).is_absolute() or Path(source).exists())
    return Path(source or "").name if is_file else source


def _write_scores(file: Path, results: Sequence[TaskResult], about: dict[str, Any]) -> None:
    """Keep the scores of these tasks, and those of others that stand there."""
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    tasks = [result.task for result in results]
    write_json(
        file, [entry for entry in before if entry["task"] not in tasks] + [result.summary() | about for result in results]
    )


def _run(
    prepared: Prepared,
    loaded: Loaded | None,
    shelf: Shelf | None,
    on_items: Callable[[int, int], None] | None,
    about: str,
) -> TaskResult:
    assert loaded is not None
    if shelf is not None:
        shelf.open()
    result = prepared.run(loaded, Ledger(prepared.items, on_items, shelf.records if shelf is not None else None))
    result = replace(result, protocol=f"{result.protocol}; {about}")
    if shelf is not None:
        shelf.close(result)
    return result


def _shelves(
    model: str | Loaded, base: str | None, dtype: str, prepared: Mapping[str, Prepared], output_dir: str | None
) -> dict[str, Shelf]:
    if output_dir is None:
        return {}
    named = _name_of(model)
    examined = {"model": named, "base": base, "dtype": dtype, "version": version("bonetune")} | _weights(named, base)
    return {name: Shelf(Path(output_dir), name, examined | one.identity) for name, one in prepared.items()}


def _name_of(model: str | Loaded) -> str:
    return (model.adapter or model.base) if isinstance(model, Loaded) else model


def _weights(name: str, base: str | None) -> dict[str, str | None]:
    """Fingerprints of the weights, those of an adapter's base too; what lies on the hub is fetched, as it will have to be."""
    adapter = next((Path(name) / file for file in ADAPTER_FILES if (Path(name) / file).is_file()), None)
    if adapter is None:
        return {"weights": fingerprint_of(name, fetch=True)}
    base = base or read_config(Path(name) / ADAPTER_CONFIG).get("base_model_name_or_path")
    return {"weights": sha256(adapter), "base_weights": fingerprint_of(base, fetch=True) if base else None}
