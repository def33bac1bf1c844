"""GLUE (arXiv 1804.07461): five of its tasks on their development sets, for classifiers, as the LoRA paper scores them."""

from dataclasses import dataclass, replace
from functools import partial

from bonetune.evaluation.rows import classification
from bonetune.evaluation.task import Prepared, Request, Task

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
    return classification(request, f"glue:{name}", glue.score)


TASKS = tuple(Task(f"glue:{name}", partial(_prepare, name), ("SEQ_CLS",)) for name in _GLUE)
