"""Tasks on plain text: perplexity, and forgetting, the rise of the loss that fine-tuning on something else has brought."""

import math
import sys
from contextlib import nullcontext
from typing import Any

from bonetune.data import Encoded, EncodedSet, RowFormat, prompt_tokens
from bonetune.data.examples import IGNORED
from bonetune.data.tokens import opening_tokens
from bonetune.errors import InputError
from bonetune.evaluation.ledger import Ledger
from bonetune.evaluation.result import Record, TaskResult
from bonetune.evaluation.rows import losses_of, mean_loss, weighted
from bonetune.evaluation.statistics import bootstrap
from bonetune.evaluation.task import Prepared, Request, Task, digest
from bonetune.models import Loaded, load_model, task_type_of

WINDOW = 1024  # tokens


def perplexity(request: Request) -> Prepared:
    """exp(mean loss of a token) on plain text; beside it the loss, and bits a byte of what is predicted."""
    texts, identity = _texts(request, "perplexity")

    def run(loaded: Loaded, ledger: Ledger) -> TaskResult:
        examples = windows(loaded, texts)
        records = losses_of(loaded, examples, request.batch_size, ledger)
        ledger.count(len(texts) - len(records))
        loss = mean_loss(records)
        nats = loss * sum(record["supervised_tokens"] for record in records)
        size = sum(predicted_bytes(loaded.tokenizer, texts[record["row"] - 1]) for record in records)
        low, high = bootstrap(*weighted(records, [record["loss"] for record in records]))
        return TaskResult(
            "perplexity",
            _exp(loss),
            (_exp(low), _exp(high)),
            len(records),
            records,
            {"loss": loss, "bits_per_byte": nats / math.log(2) / size if size else math.nan} | _dropped(texts, records),
            f"perplexity: {_PROTOCOL}; interval: bootstrap over texts",
            higher_is_better=False,
        )

    return Prepared(len(texts), identity, run)


def forgetting(request: Request) -> Prepared:
    """Mean loss of a token on plain text, minus the base model's."""
    texts, identity = _texts(request, "forgetting")
    if request.base is not None:
        task_type_of(request.base, trust_remote_code=bool(request.options.get("trust_remote_code")))  # is there such a model

    def run(loaded: Loaded, ledger: Ledger) -> TaskResult:
        examples, (base, within) = windows(loaded, texts), base_of(loaded, request)
        _check_alike(loaded, examples, base, windows(base, texts))
        own = losses_of(loaded, examples, request.batch_size, Ledger(0))
        with within:
            before = losses_of(base, examples, request.batch_size, ledger)
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
            {"loss": loss, "base_loss": base_loss} | _dropped(texts, records),
            f"forgetting: loss less the base model's, nats a token; {_PROTOCOL}; interval: paired bootstrap over texts",
            higher_is_better=False,
        )

    return Prepared(len(texts), identity, run)


_PROTOCOL = (
    f"plain text in windows of {WINDOW} tokens (fewer where the model takes fewer), each token predicted once from those "
    "before it in its window"
)


def base_of(loaded: Loaded, request: Request) -> tuple[Loaded, Any]:
    """The base model, and within what it is one: the adapter switched off, or the model that the user names.

    Raises `InputError` if there is neither.
    """
    if hasattr(loaded.model, "disable_adapter"):
        return loaded, loaded.model.disable_adapter()
    if request.base is None:
        raise InputError(no_base(loaded.base))
    dtype = str(loaded.model.dtype).removeprefix("torch.")  # what is rounded differently is not forgotten
    return load_model(request.base, dtype, trust_remote_code=bool(request.options.get("trust_remote_code"))), nullcontext()


def no_base(name: str) -> str:
    """What is wrong with asking for the forgetting of a model that is no adapter."""
    return f"forgetting is measured against the base model, and {name} has no adapter: name it with base."


def _check_alike(loaded: Loaded, examples: EncodedSet, base: Loaded, of_base: EncodedSet) -> None:
    """Raise `InputError` if the two models do not predict the same tokens from the same ones."""
    if base is loaded:
        return
    rooms, counts = (_room(loaded), _room(base)), (len(examples), len(of_base))
    if rooms[0] != rooms[1] and counts[0] != counts[1]:
        why = f"windows of {rooms[0]} and {rooms[1]} tokens, which is what they take"
    elif counts[0] != counts[1] or any(
        list(one.input_ids) != list(other.input_ids) for one, other in zip(examples, of_base, strict=True)
    ):
        why = "other tokens of the same texts, for their tokenizers differ"
    else:
        return
    raise InputError(
        f"{loaded.base} and its base {base.base} predict {why}: their losses do not compare. Name the model that "
        f"{loaded.base} was made of."
    )


def predicted_bytes(tokenizer: Any, text: str) -> int:
    """How many of a text's bytes are predicted: all of them behind an opening token, else those behind the first token."""
    size = len(text.encode())
    if opening_tokens(tokenizer):
        return size
    first = prompt_tokens(tokenizer, text)[0]
    shown = tokenizer.decode([first], skip_special_tokens=True)
    if shown and not text.startswith(shown):  # a part of a character: a name has a sign for each byte, or is <0xE2>
        name = str(tokenizer.convert_ids_to_tokens(first))
        return size - (1 if name.startswith("<0x") else len(name))
    return size - len(shown.encode())


def _dropped(texts: list[str], records: list[Record]) -> dict[str, float]:
    """How many texts have nothing to predict, if any do."""
    count = len(texts) - len(records)
    return {"dropped": float(count)} if count else {}


def _room(loaded: Loaded) -> int:
    return min(WINDOW, getattr(loaded.model.config, "max_position_embeddings", None) or WINDOW)


def windows(loaded: Loaded, texts: list[str]) -> EncodedSet:
    """The texts as examples, each token but a text's first one predicted once; a text's number, from 1, is the row's."""
    room, examples = _room(loaded), []
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
    if math.isnan(loss):
        return loss
    return math.exp(loss) if loss < math.log(sys.float_info.max) else math.inf


_HEEDS = ("dataset_field", "dataset_format")
TASKS = (
    Task("perplexity", perplexity, ("CAUSAL_LM",), _HEEDS),
    Task("forgetting", forgetting, ("CAUSAL_LM",), _HEEDS),
)
