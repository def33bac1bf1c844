"""Any task of lm-evaluation-harness (github.com/EleutherAI/lm-evaluation-harness), asked and judged by the harness itself.

`lm-eval:NAME` is a task or a group that it knows, `lm-eval:NAME@5` the same with five examples shown, and `lm-eval:FILE.yaml` a
task of one's own. The model is the one that is loaded already: the harness loads none, moves none and ties no weights anew.
Its records are made at the end, so that a task that was killed begins anew.
"""

import difflib
import io
import logging
import math
import random
import re
import shutil
import statistics
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bonetune.data import read_rows
from bonetune.errors import InputError, first_line
from bonetune.evaluation.ledger import Ledger
from bonetune.evaluation.result import Record, TaskResult
from bonetune.evaluation.statistics import Z_95, Proportion
from bonetune.evaluation.task import Prepared, Request, Task, digest
from bonetune.models import Loaded

PREFIX = "lm-eval:"
# The harness's own seeds, of `random`, of NumPy and torch, and of the examples that are shown.
_SEED, _OTHER_SEED = 0, 1234
# for a standard error that has no formula
_RESAMPLINGS = 1000


def task(name: str) -> Task:
    """The task `lm-eval:NAME`, whether or not there is one: preparing it tells."""
    return Task(name, partial(prepare, name), heeds=("few_shot",))


def prepare(name: str, request: Request) -> Prepared:
    """Find a task of the harness and read its data.

    Args:
        name: lm-eval:NAME, lm-eval:NAME@SHOTS or lm-eval:FILE.yaml.
        request: `data` replaces the rows that are scored, `few_shot` with it those that examples are taken from; `limit` counts
            for each task of a group.

    Raises:
        InputError: the harness is not installed, does not know the task, or cannot have its data; `data` for a group or for a
            task that makes its own; a task for which the model's answers are run as programs or that shows pictures; another
            number of examples for a task that fixes it.
    """
    found = re.fullmatch(rf"{PREFIX}(.+?)(?:@(\d+))?", name, re.DOTALL)
    if found is None:
        raise InputError(f"{name} names no task: write {PREFIX}NAME, or {PREFIX}NAME@5 for five examples shown.")
    known, shots = found[1], None if found[2] is None else int(found[2])
    if request.split is not None and request.data is None:
        raise InputError(f"{name} is scored on the split that the harness has for it: leave dataset_split out.")
    _check_installed()
    with _quiet(), _seeded():
        tasks, groups, rows = _loaded(name, known, shots, request)
        items = sum(min(len(one.eval_docs), request.limit or sys.maxsize) for one in tasks.values())
    for one in tasks.values():
        _set_up(name, one, shots, request.max_new_tokens)
    identity = {
        "harness": _version(),
        "tasks": {key: {"version": one.VERSION, "shots": one.get_config("num_fewshot")} for key, one in tasks.items()},
        "rows": rows,
        "limit": request.limit,
        "batch_size": request.batch_size,
        "max_new_tokens": request.max_new_tokens,
    }

    def run(loaded: Loaded, ledger: Ledger) -> TaskResult:
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        told = _Told(ledger, tasks, items)
        training = loaded.model.training
        loaded.model.eval()
        try:
            with _quiet(), _seeded(loaded.model.device):
                make: Any = HFLM
                model = make(_Untouched(loaded.model), tokenizer=loaded.tokenizer, batch_size=request.batch_size)
                model.set_cache_hook(told)
                for one in tasks.values():
                    one.set_fewshot_seed(_OTHER_SEED)
                wanted: Any = {"tasks": tasks, "groups": groups}
                results: Any = evaluate(model, wanted, limit=request.limit, bootstrap_iters=_RESAMPLINGS)
        except AssertionError as error:  # how the harness says that prompts, answers and the model do not fit
            raise InputError(f"{name} does not fit {loaded.adapter or loaded.base}: {first_line(error)}") from error
        finally:
            loaded.model.train(training)
        told.finish()
        return _result(name, results, groups, model.max_length, request)

    return Prepared(items, identity, run)


def _check_installed() -> None:
    try:
        import lm_eval.tasks  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"Tasks of lm-evaluation-harness need a package that is not installed ({first_line(error)}): "
            "pip install 'bonetune[lm-eval]'."
        ) from error


def _version() -> str:
    import lm_eval

    return lm_eval.__version__


@cache
def manager(*, with_its_own: bool = True) -> Any:
    """The harness's index of tasks. Its own are in 14,000 files, which takes some 10 s."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=with_its_own)


def _loaded(name: str, known: str, shots: int | None, request: Request) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """The harness's tasks by name; its groups, the one that is asked for first; and fingerprints of the user's rows."""
    file = Path(known)
    configuration: Mapping[str, Any]
    if file.suffix in (".yaml", ".yml"):
        if not file.is_file():
            raise InputError(f"{name}: there is no such file.")
        if request.data is not None:
            raise InputError(f"{name} takes no data: name it in the file, dataset_path: json and dataset_kwargs: data_files.")
        index, configuration = manager(with_its_own=False), {}
    else:
        index = manager()
        configuration = _configuration(name, known, index, request)
    changes, rows = _changes(name, configuration, shots, request)
    # a group of one's own is the harness's way to change a task that it knows
    wanted: Any = known if changes is None else {"group": PREFIX, "task": [{"task": known, **changes}]}
    try:
        found = index.load([wanted])
    except ImportError as error:
        raise InputError(f"{name} needs a package that is not installed ({first_line(error)}): install it.") from error
    except Exception as error:  # the hub, rows with other fields and a task's own code lead to any
        reason = f"{type(error).__name__}: {first_line(error)}"
        if request.data is not None:
            raise InputError(f"{name}: the rows of {request.data} are not what the task reads ({reason}).") from error
        if not configuration:
            raise InputError(
                f"{name} is no task that the harness can load, or its data is not to be had ({reason})."
            ) from error
        raise InputError(
            f"{name}: its data, {configuration.get('dataset_path', 'see its configuration')}, is not to be had ({reason}). It "
            "comes from the hub, which needs a connection, unless you pass data, a file of its rows."
        ) from error
    tasks, groups = found["tasks"], {} if changes is not None else dict(found["groups"])
    scored = next(iter(groups.values())).has_aggregation if groups else len(tasks) == 1
    if not scored:
        raise InputError(
            f"{name} is a name for {len(tasks)} tasks, without a score of its own: choose {', '.join(list(tasks)[:20])}."
        )
    return tasks, groups, rows


def _configuration(name: str, known: str, index: Any, request: Request) -> Mapping[str, Any]:
    """What the harness's file says of a task. Raises `InputError` if there is none, or it cannot have the user's rows."""
    if known not in index.task_index:
        close = difflib.get_close_matches(known, index.all_tasks, 5, 0.7)
        remedy = f"did you mean {', '.join(close)}?" if close else "`lm_eval ls tasks` lists those there are."
        raise InputError(f"{name}: lm-evaluation-harness {_version()} knows no task {known!r}: {remedy}")
    configuration = index.task_index[known].cfg or {}
    _refuse_programs(name, configuration.get("unsafe_code", False))  # before the package that runs them is looked for
    own = "is a name for several tasks" if known not in index.all_subtasks else "makes its data by a program"
    if request.data is not None and (known not in index.all_subtasks or "class" in configuration):
        raise InputError(f"{name} {own}, so data cannot replace it: leave data out, or name another task.")
    return configuration


def _changes(
    name: str, configuration: Mapping[str, Any], shots: int | None, request: Request
) -> tuple[dict[str, Any] | None, dict[str, str] | None]:
    """What to change in a task so that it has the user's rows, and their fingerprints; None: nothing."""
    shown = configuration.get("fewshot_config") or {}
    split = shown.get("split") or configuration.get("fewshot_split")
    fixed = split is None and shown.get("samples") is not None
    splits = [configuration.get(f"{part}_split") for part in ("training", "validation", "test")]
    needed = (configuration.get("num_fewshot") or 0) if shots is None else shots
    if request.data is None:
        if request.few_shot is not None and needed and not fixed:
            raise InputError(f"{name} takes examples from its own data: pass data with few_shot, or leave few_shot out.")
        return None, None
    scored = splits[2] or splits[1]
    examples = None if fixed else split or next(filter(None, splits), None)
    rows = read_rows(request.data, request.split or scored or "test")
    others = rows
    if examples not in (None, scored):
        if request.few_shot is not None:
            others = read_rows(request.few_shot)
        elif needed:
            raise InputError(
                f"{name} shows {needed} examples: pass few_shot, the rows to take them from, or write @0 behind it."
            )
    content = {examples: others, scored: rows}
    # on the disk, where what a task makes of its rows is kept: made twice, it is not the same if the task shuffles
    folder = tempfile.mkdtemp(prefix="bonetune-")

    def custom_dataset(**_: Any) -> Any:
        from datasets import Dataset, DatasetDict, load_from_disk

        made = {split: Dataset.from_list(list(of_split)) for split, of_split in content.items() if split}
        DatasetDict(made).save_to_disk(folder)
        return load_from_disk(folder)

    weakref.finalize(custom_dataset, shutil.rmtree, folder, ignore_errors=True)  # with the last task that has it
    fingerprints = {"data": digest(rows)} | ({"few_shot": digest(others)} if others is not rows else {})
    return {"custom_dataset": custom_dataset, "dataset_kwargs": None}, fingerprints


def _set_up(name: str, one: Any, shots: int | None, max_new_tokens: int | None) -> None:
    """Give a task the numbers that the user chooses. Raises `InputError` if it is not for us, or fixes them."""
    _refuse_programs(name, getattr(one, "UNSAFE_CODE", False))
    if getattr(one, "MULTIMODAL", False):
        raise InputError(f"{name} shows pictures or plays sounds, and the models here read text: choose another task.")
    own = one.get_config("num_fewshot")
    if shots is not None and own == 0 and shots:
        raise InputError(f"{name}: {one.task_name} is asked without examples, by its own rule: leave @{shots} out.")
    one.set_config("num_fewshot", (own or 0) if shots is None else shots)
    if max_new_tokens is not None and one.OUTPUT_TYPE == "generate_until":
        one.set_config("generation_kwargs", {"max_gen_toks": max_new_tokens}, update=True)


def _refuse_programs(name: str, unsafe: bool) -> None:
    if unsafe:
        raise InputError(f"{name} runs the programs that the model writes, which nothing here confines: use lm_eval for it.")


class _Untouched:
    """A model that can be called and generates, but is no module, so that the harness does not tie its weights.

    Tied anew, an adapter's own copy of the head or the embeddings is lost.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class _Told:
    """What the harness calls with every answer, counted in items: an item may need several."""

    def __init__(self, ledger: Ledger, tasks: Mapping[str, Any], items: int) -> None:
        self.ledger, self.tasks, self.items = ledger, tasks, items
        self.answers = self.expected = self.done = 0

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        """An answer is there."""
        if not self.expected:
            self.expected = sum(asked.repeats for one in self.tasks.values() for asked in one.instances)
        self.answers += 1
        self._count(self.items * self.answers // self.expected)

    def finish(self) -> None:
        """All are there."""
        self._count(self.items)

    def _count(self, done: int) -> None:
        if done > self.done:
            self.ledger.count(done - self.done)
            self.done = done


def _result(name: str, results: Mapping[str, Any], groups: Mapping[str, Any], max_length: int, request: Request) -> TaskResult:
    """The harness's results as ours: the score is the first metric of the task's configuration, by its first filter."""
    samples = results["samples"]
    whole = next(iter(groups or samples))
    own = {key: _number(value) for key, value in results["results"][whole].items() if "," in key}
    numbers = {key: value for key, value in own.items() if value is not None and "_stderr," not in key}
    listed = groups[whole].aggregate_metric_list if groups else results["configs"][whole].get("metric_list") or ()
    key = _main(numbers, [one.metric if groups else _metric_name(one) for one in listed])
    if key is None:
        raise InputError(f"{name} has no score that is a number: choose another task.")
    metric, _, chosen = key.partition(",")
    records = _records(samples, metric, chosen, named=bool(groups))
    outcomes = [record.get("correct") for record in records]
    score, interval = numbers[key], None
    error = own.get(f"{metric}_stderr,{chosen}")
    if None not in outcomes and math.isclose(score, sum(map(bool, outcomes)) / len(outcomes)):
        interval = Proportion.of([bool(outcome) for outcome in outcomes]).interval
    elif error is not None:
        interval = (score - Z_95 * error, score + Z_95 * error)
    metrics = {other: value for other, value in own.items() if value is not None and other != key}
    for part, of_part in results["results"].items():
        if part != whole:
            values = {f"{part}:{other}": _number(value) for other, value in of_part.items() if "," in other}
            metrics |= {other: value for other, value in values.items() if value is not None and "_stderr," not in other}
    shots = sorted({results["n-shot"][part] for part in samples})
    generated = any(results["configs"][part].get("output_type") == "generate_until" for part in samples)
    protocol = (
        f"{name}: lm-evaluation-harness {_version()}, {whole} version {results['versions'].get(whole)}, "
        f"{' or '.join(map(str, shots))} examples shown, {metric} after the filter {chosen}; no chat template; prompts cut "
        f"from the left to the model's {max_length} tokens"
        + ("; generated as the model's generation_config says" if generated else "")
        + (f"; at most {request.max_new_tokens} new tokens" if request.max_new_tokens is not None else "")
        + ("; on the user's rows" if request.data is not None else "")
    )
    better = results["higher_is_better"].get(whole, {}).get(metric, True)
    return TaskResult(name, score, interval, len(records), records, metrics, protocol, better is not False)


def _main(numbers: Mapping[str, float], listed: Sequence[str]) -> str | None:
    """The first metric of the configuration that is reported, else the first that is, after the first filter."""
    if not numbers:
        return None
    first = next(iter(numbers))
    chosen = first.partition(",")[2]
    return next((key for metric in listed if (key := f"{metric},{chosen}") in numbers), first)


def _metric_name(configured: Mapping[str, Any]) -> str:
    metric = configured["metric"]
    return getattr(metric, "__name__", str(metric))


def _records(samples: Mapping[str, Sequence[Mapping[str, Any]]], metric: str, chosen: str, named: bool) -> list[Record]:
    """A record of each item, with the answer as it was and what the filter made of it, and all metrics that are numbers."""
    records: list[Record] = []
    for part, of_part in samples.items():
        values: dict[int, dict[str, float]] = {}
        for sample in of_part:
            found = {f"{one},{sample['filter']}": _number(sample[one]) for one in sample["metrics"]}
            values.setdefault(sample["doc_id"], {}).update({key: v for key, v in found.items() if v is not None})
        mine = [sample for sample in of_part if sample["filter"] == chosen]
        scores = [values[sample["doc_id"]].pop(f"{metric},{chosen}", None) for sample in mine]
        told = "correct" if all(score in (0, 1) for score in scores) else "score"
        for sample, score in zip(mine, scores, strict=True):
            record: Record = {"row": len(records) + 1} | ({"task": part} if named else {}) | _exchange(sample)
            record |= {} if score is None else {told: bool(score) if told == "correct" else score}
            others = values[sample["doc_id"]]
            records.append(record | ({"metrics": others} if others else {}))
    return records


def _exchange(sample: Mapping[str, Any]) -> Record:
    """What an item asked, what was answered and what was expected."""
    arguments, target = sample["arguments"], sample["target"]
    if isinstance(sample["resps"][0][0], str):  # a text was generated
        texts = list(sample["resps"][0])
        record: Record = {"prompt": arguments[0][0], "output": texts[0] if len(texts) == 1 else texts}
        answer = sample["filtered_resps"][0]
        return (
            record | ({"answer": _json_value(answer)} if answer != record["output"] else {}) | {"expected": _json_value(target)}
        )
    likelihoods = [float(one[0] if isinstance(one, tuple | list) else one) for one, *_ in sample["resps"]]
    if len(arguments) == 1:  # how probable a text is
        text = arguments[0][-1]
        record = {"prompt": arguments[0][0], "expected": text} if len(arguments[0]) > 1 else {"expected": text}
        return record | {"loglikelihood": likelihoods[0]}
    # the choices are what differs: texts that go on from one prompt, or prompts that one text goes on from
    side = 1 if len({one[1] for one in arguments}) > 1 else 0
    choices = [one[side] for one in arguments]
    found = {"choices": choices, "loglikelihoods": likelihoods, "output": choices[int(np.argmax(likelihoods))]}
    if not side:
        return found | {"continuation": arguments[0][1]}
    expected = choices[target] if isinstance(target, int) and 0 <= target < len(choices) else target
    return {"prompt": arguments[0][0], **found, "expected": _json_value(expected)}


def _json_value(value: Any) -> Any:
    """A value as JSON can write it."""
    if isinstance(value, str | bool | int | float | None):
        return value
    if isinstance(value, np.generic):
        return value.item()
    return [_json_value(one) for one in value] if isinstance(value, list | tuple) else str(value)


def _number(value: Any) -> float | None:
    """A metric's value if it is a number; the harness has texts and tuples as well."""
    if isinstance(value, np.generic):
        value = value.item()
    return float(value) if isinstance(value, bool | int | float) and math.isfinite(value) else None


@contextmanager
def _seeded(device: torch.device | None = None) -> Iterator[None]:
    """The harness's seeds, which tasks that shuffle need when they are loaded; what the caller had comes back."""
    drawn, arrays = random.getstate(), np.random.get_state()
    devices = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        random.seed(_SEED)
        np.random.seed(_OTHER_SEED)
        torch.manual_seed(_OTHER_SEED)
        try:
            yield
        finally:
            random.setstate(drawn)
            np.random.set_state(arrays)


def _spread(statistic: Callable[[Sequence[Any]], float], items: Sequence[Any], iters: int) -> float:
    """The harness's bootstrapped standard error, in this process."""
    draw = random.Random(0)  # noqa: S311  (draws to be repeated)
    return statistics.stdev(statistic(draw.choices(items, k=len(items))) for _ in range(iters))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's advice, bars and printing, and without its processes for resampling."""
    import datasets
    from lm_eval.api import metrics, model, task
    from lm_eval.models import huggingface
    from tqdm import tqdm

    def no_bar(*args: Any, **kwargs: Any) -> Any:
        return tqdm(*args, **(kwargs | {"disable": True}))

    harness, bars = logging.getLogger("lm_eval"), not datasets.are_progress_bars_disabled()
    changed: list[tuple[Any, str, Any]] = [(module, "tqdm", no_bar) for module in (model, task, huggingface)]
    changed.append((metrics, "bootstrap_stderr", _spread))
    before, level = [getattr(module, name) for module, name, _ in changed], harness.level
    harness.setLevel(logging.ERROR)
    if bars:
        datasets.disable_progress_bars()
    for module, name, value in changed:
        setattr(module, name, value)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        for (module, name, _), value in zip(changed, before, strict=True):
            setattr(module, name, value)
        harness.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
