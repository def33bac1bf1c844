"""What the examples tell before the first step: whether a run would learn nothing, or something else than meant."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from bonetune.data.encoding import Lengths
from bonetune.data.examples import IGNORED, Encoded, EncodedSet
from bonetune.data.formats import Kind, TaskName
from bonetune.data.show import marked
from bonetune.errors import InputError

# An example so many times as long as the next longest, and of so many tokens, decides how much memory a run needs.
FAR_LONGER, LONG = 2, 256
# Rows named in a message, and characters of an example shown in one.
NAMED, SHOWN = 3, 400
# From examples' numbers to what their rows are called.
Named = Callable[[Sequence[int] | Sequence[np.intp] | np.ndarray], str]


@dataclass(frozen=True)
class Finding:
    """Something about a data set that its owner should know.

    Args:
        name: of the check.
        severity: an `error` refuses the data set.
        message: what was found, where, and what can be done.
    """

    name: str
    severity: Literal["error", "warning"]
    message: str


def check(
    train: EncodedSet,
    tokenizer: Any,
    *,
    lengths: Lengths,
    max_length: int,
    task_type: TaskName = "CAUSAL_LM",
    evaluation: EncodedSet | None = None,
    classes: Sequence[str] = (),
    sources: np.ndarray | None = None,
    names: Sequence[str] = (),
    kinds: Sequence[Kind] = (),
) -> tuple[Finding, ...]:
    """Look through the examples, and return what is worth a warning.

    Args:
        train: the training examples.
        tokenizer: the one that made them.
        lengths: theirs, with what was left out and cut.
        max_length: their limit; shorter ones are whole.
        task_type: what the model is for.
        evaluation: the held-out examples, if any.
        classes: a classifier's.
        sources: (examples,), the data set that each training example is from.
        names: of the data sets; where there are several, rows are named with theirs.
        kinds: how the rows of each are read; token ids may end anywhere, which draws a warning.

    Raises:
        InputError: one or more errors, each named: examples without a supervised token, whole examples that do not teach where
            to end, a classifier's examples of one class only.
    """

    def rows(indices: Sequence[int] | Sequence[np.intp] | np.ndarray) -> str:
        if sources is None or len(names) < 2:
            return _rows(train.rows[indices])
        return _rows(train.rows[indices], [names[int(source)] for source in sources[indices]])

    found = [*_left_out(lengths), _far_longer(train, rows), _duplicates(train, rows), _overlap(train, evaluation)]
    if task_type == "CAUSAL_LM":
        found.append(_silent(train, tokenizer, "training", rows))
        if evaluation is not None:
            found.append(_silent(evaluation, tokenizer, "held-out", lambda silent: _rows(evaluation.rows[silent])))
        given = np.isin(np.zeros(len(train)) if sources is None else sources, [n for n, k in enumerate(kinds) if k == "tokens"])
        endless = (train.lengths < max_length) & (train.supervised > 0) & (train.last_labels() != tokenizer.eos_token_id)
        found += [_endless(train, tokenizer, np.flatnonzero(endless & ~given), rows), _opened_twice(train, tokenizer, rows)]
        found.append(_given_endless(tokenizer, np.flatnonzero(endless & given), rows))
    if task_type != "SEQ_CLS":
        found.append(_empty_answers(train, tokenizer, task_type, rows))
    elif classes:
        found += _rare_classes(train, classes)
    findings = [finding for finding in found if finding is not None]
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors:
        raise InputError(" ".join(f"{error.message} [{error.name}]" for error in errors))
    return tuple(findings)


def _left_out(lengths: Lengths) -> list[Finding | None]:
    total = lengths.examples + lengths.dropped + lengths.silenced
    return [
        _warning("dropped", lengths.dropped, f"{lengths.dropped} of {total} examples are longer than max_length and left out."),
        _warning("truncated", lengths.truncated, f"{lengths.truncated} rows are longer than max_length and were cut."),
        _warning("empty-texts", lengths.empty, f"{lengths.empty} rows have no text, or no second token, and were left out."),
        _warning(
            "silenced",
            lengths.silenced,
            f"{lengths.silenced} of {total} examples have no supervised token left when cut to max_length and were left out: "
            "raise max_length to learn from them.",
        ),
    ]


def _warning(name: str, fires: object, message: str) -> Finding | None:
    return Finding(name, "warning", message) if fires else None


def _silent(examples: EncodedSet, tokenizer: Any, which: str, rows: Named) -> Finding | None:
    silent = np.flatnonzero(examples.supervised == 0)
    if not len(silent):
        return None
    return Finding(
        "nothing-supervised",
        "error",
        f"{len(silent)} of {len(examples)} {which} examples have no supervised token ({rows(silent)}): nothing "
        "would be learned from them. What is supervised would stand "
        f"between ⟦ and ⟧ here: {_shown(examples[int(silent[0])], tokenizer)}",
    )


def _endless(train: EncodedSet, tokenizer: Any, bad: np.ndarray, rows: Named) -> Finding | None:
    if not len(bad):
        return None
    return Finding(
        "end-not-learned",
        "error",
        f"{len(bad)} examples that were not cut do not end with the end-of-text token {tokenizer.eos_token!r}, supervised "
        f"({rows(bad)}): the model would not learn to stop. One of them: {_shown(train[int(bad[0])], tokenizer)}",
    )


def _given_endless(tokenizer: Any, bad: np.ndarray, rows: Named) -> Finding | None:
    return _warning(
        "given-without-end",
        len(bad),
        f"{len(bad)} examples of token ids do not end with the end-of-text token {tokenizer.eos_token!r} ({rows(bad)}): the "
        "model does not learn to stop there.",
    )


def _opened_twice(train: EncodedSet, tokenizer: Any, rows: Named) -> Finding | None:
    bos = -1 if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    twice = np.flatnonzero((train.ids_at(0) == bos) & (train.ids_at(1) == bos) & (bos >= 0))
    return _warning(
        "opened-twice",
        len(twice),
        f"{len(twice)} examples begin with {tokenizer.bos_token!r} twice ({rows(twice)}): take it out of the "
        "rows or the chat template.",
    )


def _far_longer(train: EncodedSet, rows: Named) -> Finding | None:
    if len(train) < 2:
        return None
    second, longest = np.argsort(train.lengths, kind="stable")[-2:]
    tokens, next_longest = int(train.lengths[longest]), int(train.lengths[second])
    return _warning(
        "far-longer",
        tokens >= max(LONG, FAR_LONGER * next_longest),
        f"The example of {rows([longest])} has {tokens} tokens and the next longest {next_longest}: it alone "
        "decides how much memory the run needs. Leave it out with max_length and truncation: drop.",
    )


def _duplicates(train: EncodedSet, rows: Named) -> Finding | None:
    first: dict[bytes, int] = {}
    again = [i for i, digest in enumerate(train.digests()) if first.setdefault(digest, i) != i]
    return _warning(
        "duplicates",
        again,
        f"{len(again)} of {len(train)} examples are exact copies of earlier ones ({rows(again)}).",
    )


def _overlap(train: EncodedSet, evaluation: EncodedSet | None) -> Finding | None:
    known = set(train.digests()) if evaluation is not None else set()
    seen = [i for i, digest in enumerate(evaluation.digests() if evaluation is not None else ()) if digest in known]
    if evaluation is None or not seen:
        return None
    return Finding(
        "overlap",
        "warning",
        f"{len(seen)} of {len(evaluation)} held-out examples are also trained on ({_rows(evaluation.rows[seen])} of the "
        "held-out data): their loss says nothing about new ones.",
    )


def _empty_answers(train: EncodedSet, tokenizer: Any, task_type: TaskName, rows: Named) -> Finding | None:
    # an answer is empty if what is supervised is special tokens and white space: a few tokens at most
    few = np.flatnonzero((train.supervised if task_type == "CAUSAL_LM" else train.labelled) <= 4)
    empty = [i for i in few if _answers_nothing(train[int(i)], tokenizer, task_type)]
    return _warning("empty-answers", empty, f"{len(empty)} examples have an empty answer ({rows(empty)}).")


def _answers_nothing(example: Encoded, tokenizer: Any, task_type: TaskName) -> bool:
    labels = example.labels[1:] if task_type == "CAUSAL_LM" else example.labels
    answer = [label for label in labels if label != IGNORED]
    whole = answer[-1:] == [tokenizer.eos_token_id]
    return whole and not tokenizer.decode(answer, skip_special_tokens=True).strip()


def _rare_classes(train: EncodedSet, classes: Sequence[str]) -> list[Finding | None]:
    counts = Counter(int(example.labels[0]) for example in train)
    once = [classes[number] for number in sorted(counts) if counts[number] == 1]
    absent = [name for number, name in enumerate(classes) if not counts[number]]
    one = Finding(
        "one-class",
        "error",
        f"All {len(train)} examples are of the class {classes[min(counts)]!r}: there is nothing to tell apart.",
    )
    return [
        one if len(counts) == 1 else None,
        _warning("rare-classes", once, f"Classes with one example only: {_named(once)}."),
        _warning("absent-classes", absent, f"Classes without an example to train on: {_named(absent)}."),
    ]


def _rows(numbers: np.ndarray, files: Sequence[str] | None = None) -> str:
    if files is not None:
        return _named(list(dict.fromkeys(f"row {number} of {file}" for number, file in zip(numbers, files, strict=True))))
    distinct = list(dict.fromkeys(numbers.tolist()))
    return ("row " if len(distinct) == 1 else "rows ") + _named([str(number) for number in distinct])


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")


def _shown(example: Encoded, tokenizer: Any) -> str:
    text = marked(example, tokenizer)
    return repr(text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]}")
