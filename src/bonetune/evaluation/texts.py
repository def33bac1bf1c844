"""Tasks on plain text: perplexity, and forgetting, the rise of the loss that fine-tuning on something else has brought."""

import math
import sys
from contextlib import nullcontext
from typing import Any

from bonetune.data import Encoded, EncodedSet, RowFormat, prompt_tokens
from bonetune.data.examples import IGNORED
from bonetune.errors import InputError
from bonetune.evaluation.ledger import Ledger
from bonetune.evaluation.result import Record, TaskResult
from bonetune.evaluation.rows import losses_of, mean_loss, weighted
from bonetune.evaluation.statistics import bootstrap
from bonetune.evaluation.task import Prepared, Request, Task, digest
from bonetune.models import Loaded, load_model

WINDOW = 1024  # tokens


def perplexity(request: Request) -> Prepared:
    """exp(mean loss of a token) on plain text; beside it the loss, and bits a byte, which no tokenizer changes."""
    texts, identity = _texts(request, "perplexity")

    def run(loaded: Loaded, ledger: Ledger) -> TaskResult:
        examples = windows(loaded, texts)
        records = losses_of(loaded, examples, request.batch_size, ledger)
        ledger.count(len(texts) - len(records))
        loss = mean_loss(records)
        nats = loss * sum(record["supervised_tokens"] for record in records)
        size = sum(len(texts[record["row"] - 1].encode()) for record in records)
        low, high = bootstrap(*weighted(records, [record["loss"] for record in records]))
        return TaskResult(
            "perplexity",
            _exp(loss),
            (_exp(low), _exp(high)),
            len(records),
            records,
            {"loss": loss, "bits_per_byte": nats / math.log(2) / size},
            f"perplexity: {_PROTOCOL}; interval: bootstrap over texts",
            higher_is_better=False,
        )

    return Prepared(len(texts), identity, run)


def forgetting(request: Request) -> Prepared:
    """Mean loss of a token on plain text, minus the base model's."""
    texts, identity = _texts(request, "forgetting")

    def run(loaded: Loaded, ledger: Ledger) -> TaskResult:
        own = losses_of(loaded, windows(loaded, texts), request.batch_size, Ledger(0))
        before = losses_of_base(loaded, texts, request, ledger)
        ledger.count(len(texts) - len(own))
        records = [a | {"base_loss": b["loss"]} for a, b in zip(own, before, strict=True)]
        rises = [record["loss"] - record["base_loss"] for record in records]
        loss, base_loss = mean_loss(own), mean_loss(before)
        return TaskResult(
            "forgetting",
            loss - base_loss,
            bootstrap(*weighted(records, rises)),
            len(records),
            records,
            {"loss": loss, "base_loss": base_loss},
            f"forgetting: loss less the base model's, nats a token; {_PROTOCOL}; interval: paired bootstrap over texts",
            higher_is_better=False,
        )

    return Prepared(len(texts), identity, run)


_PROTOCOL = (
    f"plain text in windows of {WINDOW} tokens (fewer where the model takes fewer), each token predicted once from those "
    "before it in its window"
)


def losses_of_base(loaded: Loaded, texts: list[str], request: Request, ledger: Ledger) -> list[Record]:
    """The records of the base model: the adapter switched off, or the model that the user names.

    Raises `InputError` if there is neither.
    """
    within: Any = nullcontext()
    if hasattr(loaded.model, "disable_adapter"):
        within = loaded.model.disable_adapter()
    elif request.base is not None:
        dtype = str(loaded.model.dtype).removeprefix("torch.")  # what is rounded differently is not forgotten
        loaded = load_model(request.base, dtype, trust_remote_code=bool(request.options.get("trust_remote_code")))
    else:
        raise InputError(f"forgetting is measured against the base model, and {loaded.base} has no adapter: name it with base.")
    with within:
        return losses_of(loaded, windows(loaded, texts), request.batch_size, ledger)


def windows(loaded: Loaded, texts: list[str]) -> EncodedSet:
    """The texts as examples, each token but a text's first one predicted once; a text's number, from 1, is the row's."""
    room = min(WINDOW, getattr(loaded.model.config, "max_position_embeddings", None) or WINDOW)
    examples = []
    for number, text in enumerate(texts, 1):
        ids = prompt_tokens(loaded.tokenizer, text) if text else []
        for start in range(0, max(1, len(ids) - 1), room - 1):
            part = ids[start : start + room]
            if len(part) > 1:
                examples.append(Encoded(part, [IGNORED, *part[1:]], number))
    if not examples:
        raise InputError("The texts have no token that follows another: there is nothing to predict.")
    return EncodedSet(examples)


def _texts(request: Request, task: str) -> tuple[list[str], dict[str, Any]]:
    rows = request.rows(task)
    kind: Any = request.dataset_format or "auto"
    row_format = RowFormat.detect(rows[0], request.dataset_field, kind=kind)
    if row_format.kind != "text":
        raise InputError(f"{task} is measured on plain text, and the rows are {row_format.kind}: name the text's field.")
    for number, row in enumerate(rows, 1):
        row_format.check(row, number)
    texts = [row[row_format.fields[0]] for row in rows]
    return texts, {"rows": digest(texts), "batch_size": request.batch_size}


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < math.log(sys.float_info.max) else math.inf


TASKS = (Task("perplexity", perplexity, ("CAUSAL_LM",)), Task("forgetting", forgetting, ("CAUSAL_LM",)))
