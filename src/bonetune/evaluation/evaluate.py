"""`bonetune eval`: tasks by name, each with a score, its interval, the protocol's full name and a record for every item."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from bonetune.data.formats import Kind, TaskName
from bonetune.errors import InputError
from bonetune.evaluation import glue, gsm8k, harness, humaneval, mathematics, mt_bench, rows, texts
from bonetune.evaluation.fingerprints import fingerprints, name_of
from bonetune.evaluation.ledger import Ledger, Shelf
from bonetune.evaluation.result import TaskResult
from bonetune.evaluation.task import CHOICES, Judge, Prepared, Request, Task
from bonetune.evaluation.trained_with import TrainedWith
from bonetune.files import usable_folder, write_json
from bonetune.formats.tensors import ADAPTER_CONFIG
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
    on_result: Callable[[TaskResult], None] | None = None,
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
        on_result: called with each result as soon as it is there.

    Raises:
        InputError: unknown task or format, or one that the model is not for, an option that none of the tasks heeds, bad limit,
            unreadable data or model, or an `output_dir` with records in it and neither `resume` nor `overwrite`, or with
            `resume` records of something else.

    Example:
        >>> bonetune.evaluate("runs/first", ["gsm8k:strict"], data="gsm8k/test.jsonl", output_dir="scores")
    """
    for name in tasks:
        task_named(name)  # a name that is none is told of before the model is looked for
    if output_dir is not None:
        usable_folder(Path(output_dir), "output_dir")
    adapted = isinstance(model, str) and (Path(model) / ADAPTER_CONFIG).is_file()
    if base is not None and not adapted and "forgetting" not in tasks:
        raise InputError(f"{model} is not an adapter folder (no {ADAPTER_CONFIG} in it), so it takes no base model.")
    has_adapter = hasattr(model.model, "disable_adapter") if isinstance(model, Loaded) else adapted
    if "forgetting" in tasks and base is None and not has_adapter:
        raise InputError(texts.no_base(name_of(model)))
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
    shelves, stranger = _shelves(model, base, dtype, prepared, output_dir)
    for shelf in shelves.values():
        shelf.claim(resume=resume, overwrite=overwrite, stranger=stranger)
    finished = {name: result for name, shelf in shelves.items() if (result := shelf.result) is not None}
    results: list[TaskResult] = []
    named = name_of(model)
    loaded = model if isinstance(model, Loaded) else None
    for name, one in prepared.items():
        if name not in finished and one.first is not None:
            one.first()
    for name, one in prepared.items():
        if name not in finished and loaded is None:
            loaded = load_model(str(model), dtype, base if adapted else None, trust_remote_code=trust_remote_code)
        told = partial(on_items, name) if on_items is not None else None
        results.append(finished[name] if name in finished else _run(one, loaded, shelves.get(name), told, asked(name, one)))
        if output_dir is not None:
            made = dtype if loaded is None else str(loaded.model.dtype).removeprefix("torch.")
            about = {"model": named, "dtype": made}
            _write_scores(Path(output_dir) / SCORES_FILE, results[-1], about, finished=name in finished)
        if on_result is not None:
            on_result(results[-1])
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
    chosen = [task_named(name) for name in tasks]
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
    chosen_by_user = {
        "dataset_field": dataset_field,
        "dataset_format": dataset_format,
        **{name: more.get(name) for name in CHOICES[2:]},
    }
    _refuse_unheeded(chosen, [name for name, value in chosen_by_user.items() if value is not None])
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


def _refuse_unheeded(tasks: Sequence[Task], given: Iterable[str]) -> None:
    """Raise `InputError` for a choice that means nothing to any of the tasks."""
    for name in given:
        if not any(name in task.heeds for task in tasks):
            others = [task.name for task in TASKS.values() if name in task.heeds]
            others += [f"{harness.PREFIX}NAME"] if name in harness.task("").heeds else []
            raise InputError(
                f"{name} means nothing to {', '.join(task.name for task in tasks)}: leave it out, or choose a task that heeds "
                f"it ({', '.join(others)})."
            )


def task_named(name: str) -> Task:
    """The task of that name. Raises `InputError` if there is none."""
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
) -> Callable[[str, Prepared], str]:
    """What the user has chosen otherwise than the protocol has it, and the version, in words, by task: no more than it used."""

    def told(task: str, prepared: Prepared) -> str:
        source = data.get(task) if isinstance(data, Mapping) else data
        rows = {"rows of": _named(source), "split": split, "the first": limit}
        chosen = {
            "few_shot": ("examples of", _named(few_shot)),
            "dataset_format": ("read as", dataset_format),
            "dataset_field": ("fields", None if dataset_field is None else ", ".join(dataset_field)),
            "prompt_template": ("prompt template", None if template is None else repr(template)),
        }
        used = set(task_named(task).heeds) - set(prepared.named)
        entries = [*rows.items(), *(entry for option, entry in chosen.items() if option in used)]
        parts = [f"{name} {value}" for name, value in entries if value is not None]
        return "; ".join([*parts, f"bonetune {version('bonetune')}"])

    return told


def _named(source: str | None) -> str | None:
    """A file by its name alone, a data set by all of it."""
    is_file = source is not None and (Path(source).is_absolute() or Path(source).exists())
    return Path(source or "").name if is_file else source


def _write_scores(file: Path, result: TaskResult, about: dict[str, Any], *, finished: bool) -> None:
    """Put a task's score behind those of others that stand there; of one finished before, what stood there of its model."""
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    if finished:
        about |= next((entry | result.summary() for entry in before if entry["task"] == result.task), {})
    write_json(file, [entry for entry in before if entry["task"] != result.task] + [result.summary() | about])


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
) -> tuple[dict[str, Shelf], str | None]:
    """A place for each task; and the model without fingerprint, if there is one among those that the records depend on."""
    if output_dir is None:
        return {}, None
    prints = fingerprints(model, base)
    stranger = next((name for name, found in prints.values() if found is None), None)
    examined = {"model": name_of(model), "base": base, "dtype": dtype, "version": version("bonetune")}
    examined |= {what: found for what, (_, found) in prints.items()}
    return {name: Shelf(Path(output_dir), name, examined | one.identity) for name, one in prepared.items()}, stranger
