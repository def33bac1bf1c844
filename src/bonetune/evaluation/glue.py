"""GLUE (arXiv 1804.07461): its tasks on their development sets, for classifiers.

The scores are those that the LoRA paper reports: Matthews' correlation of CoLA, Pearson's of STS-B, accuracy of the others, and
of MNLI's two sets together (`glue:mnli-overall`). GLUE's second ones are beside them: F1 of MRPC and QQP, Spearman's of STS-B.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from bonetune.errors import InputError
from bonetune.evaluation.ledger import Ledger
from bonetune.evaluation.result import TaskResult
from bonetune.evaluation.rows import READING, classification
from bonetune.evaluation.statistics import Proportion
from bonetune.evaluation.task import Prepared, Request, Task
from bonetune.metrics import f1
from bonetune.models import Loaded

_HUB = "nyu-mll/glue"


@dataclass(frozen=True)
class _Glue:
    """One of its tasks: the texts' fields in the public files, the score, the development sets' names.

    `positive` is the class that GLUE's F1 is of: number 1 in the public files, and there named so.
    """

    texts: tuple[str, ...]
    score: str = "accuracy"
    splits: tuple[str, ...] = ("validation",)
    configuration: str | None = None
    positive: str | None = None


_PAIR = ("sentence1", "sentence2")
_MNLI = _Glue(("premise", "hypothesis"), configuration="mnli")
# MNLI's development sets are two: of the genres of training (matched) and of others.
_SETS = {"matched": "validation_matched", "mismatched": "validation_mismatched"}
_GLUE = {
    "mnli": replace(_MNLI, splits=(_SETS["matched"],)),
    "mnli-mismatched": replace(_MNLI, splits=(_SETS["mismatched"],)),
    "mnli-overall": replace(_MNLI, splits=tuple(_SETS.values())),
    "sst2": _Glue(("sentence",)),
    "cola": _Glue(("sentence",), score="matthews"),
    "qnli": _Glue(("question", "sentence")),
    "mrpc": _Glue(_PAIR, positive="equivalent"),
    "qqp": _Glue(("question1", "question2"), positive="duplicate"),
    "rte": _Glue(_PAIR),
    "stsb": _Glue(_PAIR, score="pearson"),
    "wnli": _Glue(_PAIR),
}


def _prepare(name: str, request: Request) -> Prepared:
    glue, task = _GLUE[name], f"glue:{name}"
    # a file is one set, whatever is in it
    own = glue.splits[:1] if request.data is not None and Path(request.data).is_file() else glue.splits
    parts = [
        classification(
            replace(
                request,
                data=request.data or f"{_HUB}:{glue.configuration or name}",
                split=split,
                dataset_field=request.dataset_field or (*glue.texts, "label"),
            ),
            task,
            glue.score,
        )
        for split in ((request.split,) if request.split else own)
    ]
    identity = parts[0].identity if len(parts) == 1 else {"sets": [part.identity for part in parts]}
    return Prepared(sum(part.items for part in parts), identity, partial(_run, task, glue, parts))


def _run(task: str, glue: _Glue, parts: Sequence[Prepared], loaded: Loaded, ledger: Ledger) -> TaskResult:
    config = loaded.model.config
    if glue.score == "pearson" and config.num_labels != 1:
        raise InputError(
            f"{task} is a number to be predicted, and {loaded.adapter or loaded.base} has {config.num_labels} classes: "
            "train with num_labels 1."
        )
    positive = _positive(task, glue.positive, config) if glue.positive else None
    results = [part.run(loaded, ledger) for part in parts]
    result = results[0] if len(results) == 1 else _together(parts, results)
    return result if positive is None else _with_f1(result, positive)


def _positive(task: str, name: str, config: Any) -> str:
    """What records call the class `name`: so, or 1 where the classes have numbers. Raises `InputError` if it is not there."""
    classes = [config.id2label[number] for number in range(config.num_labels)]
    if classes == [f"LABEL_{number}" for number in range(config.num_labels)]:
        return "1"
    if name in classes:
        return name
    if "1" in classes and all(one.isdigit() for one in classes):
        return "1"
    raise InputError(
        f"{task} has F1 of the class {name!r}, and the model's classes are {', '.join(classes)}: call it so in the config's "
        "id2label and label2id, and in the rows."
    )


def _with_f1(result: TaskResult, positive: str) -> TaskResult:
    """A result with F1 of one class; the mean over the classes, which it has, is then `macro_f1`."""
    pairs = Counter((record["output"] == positive, record["expected"] == positive) for record in result.records)
    right, given, wanted = pairs[True, True], pairs[True, True] + pairs[True, False], pairs[True, True] + pairs[False, True]
    others = {name: value for name, value in result.metrics.items() if name != "f1"}
    metrics = {"f1": float(f1(right, given, wanted)), "macro_f1": result.metrics["f1"]} | others
    return replace(result, metrics=metrics, protocol=f"{result.protocol}; f1 of the class {positive}")


def _together(parts: Sequence[Prepared], results: Sequence[TaskResult]) -> TaskResult:
    """MNLI's two sets as one: records one after the other, the share of both that is right, and each set's own beside it."""
    records, before = [], 0
    for part, result in zip(parts, results, strict=True):
        records += [record | {"row": record["row"] + before} for record in result.records]
        before += part.items
    share = Proportion.of([record["correct"] for record in records])
    metrics = {name: result.score for name, result in zip(_SETS, results, strict=True)}
    for name in ("truncated", "dropped"):
        if count := sum(result.metrics.get(name, 0.0) for result in results):
            metrics[name] = count
    protocol = f"{results[0].protocol}; of both development sets together"
    return TaskResult(results[0].task, share.value, share.interval, share.total, records, metrics, protocol)


TASKS = tuple(Task(f"glue:{name}", partial(_prepare, name), ("SEQ_CLS",), READING[:2]) for name in _GLUE)
