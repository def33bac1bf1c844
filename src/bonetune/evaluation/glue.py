"""GLUE (arXiv 1804.07461): five of its tasks on their development sets, for classifiers, as the LoRA paper scores them."""

from dataclasses import dataclass, replace
from functools import partial

from bonetune.evaluation.ledger import Ledger
from bonetune.evaluation.result import TaskResult
from bonetune.evaluation.rows import classification
from bonetune.evaluation.task import Prepared, Request, Task
from bonetune.models import Loaded

_HUB = "nyu-mll/glue"


@dataclass(frozen=True)
class _Glue:
    """One of its tasks: the texts' fields in the public files, the score, and the development set's name."""

    texts: tuple[str, ...]
    score: str = "accuracy"
    split: str = "validation"
    configuration: str | None = None


# MNLI's development sets are two: of the genres of training (matched) and of others.
_GLUE = {
    "mnli": _Glue(("premise", "hypothesis"), split="validation_matched"),
    "mnli-mismatched": _Glue(("premise", "hypothesis"), split="validation_mismatched", configuration="mnli"),
    "sst2": _Glue(("sentence",)),
    "cola": _Glue(("sentence",), score="matthews"),
    "qnli": _Glue(("question", "sentence")),
    "mrpc": _Glue(("sentence1", "sentence2")),
}


def _prepare(name: str, request: Request) -> Prepared:
    glue = _GLUE[name]
    request = replace(
        request,
        data=request.data or f"{_HUB}:{glue.configuration or name}",
        split=request.split or glue.split,
        dataset_field=request.dataset_field or (*glue.texts, "label"),
    )
    prepared = classification(request, f"glue:{name}", glue.score)
    return replace(prepared, run=partial(_with_f1, prepared)) if name == "mrpc" else prepared


def _with_f1(prepared: Prepared, loaded: Loaded, ledger: Ledger) -> TaskResult:
    """MRPC's result with GLUE's F1, of the paraphrases: label 1, or the second of classes that have names.

    The mean over the classes is `macro_f1`.
    """
    result = prepared.run(loaded, ledger)
    numbered = all(record["expected"].isdigit() for record in result.records)
    positive = "1" if numbered else loaded.model.config.id2label[1]
    given, wanted = ([record[side] == positive for record in result.records] for side in ("output", "expected"))
    found = sum(given) + sum(wanted)
    f1 = 2 * sum(a and b for a, b in zip(given, wanted, strict=True)) / found if found else 0.0
    others = {name: value for name, value in result.metrics.items() if name != "f1"}
    return replace(result, metrics={"f1": f1, "macro_f1": result.metrics["f1"]} | others)


TASKS = tuple(Task(f"glue:{name}", partial(_prepare, name), ("SEQ_CLS",)) for name in _GLUE)
