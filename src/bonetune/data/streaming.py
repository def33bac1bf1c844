"""Examples of rows that are read as they are needed."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal

import numpy as np

from bonetune.data.encoding import Lengths, Truncation, counts_of, encode_stream
from bonetune.data.examples import Encoded, EncodedSet
from bonetune.data.formats import PAPER_PROMPT, Kind, RowFormat, TaskName
from bonetune.data.interleaving import interleaved
from bonetune.data.preflight import Finding, check
from bonetune.data.reading import read_rows, stream_rows
from bonetune.data.sources import Encode, detected, naming, prompts_of, source_names
from bonetune.errors import InputError

# Examples that are looked through before the first step.
HEAD = 1000


@dataclass(frozen=True)
class ExampleStream:
    """Examples encoded as they are asked for, the same ones in the same order each time this is iterated over.

    Args:
        head: the first examples, looked through.
        evaluation: the held-out examples, if any; read whole.
        lengths: of the head, with what was left out and cut on the way.
        findings: what is worth a warning, in the head.
        prompts, opened: as in `Prepared`, from the head.
        row_formats: of each data set.
        outcomes: what became of the rows read since the latest iteration began, under the names of `Lengths`. Beyond the head,
            examples without a supervised token are left out and counted as `unsupervised`.
    """

    head: EncodedSet
    evaluation: EncodedSet | None
    lengths: Lengths
    findings: tuple[Finding, ...]
    prompts: list[tuple[str, str]]
    opened: bool
    row_formats: tuple[RowFormat, ...]
    outcomes: Counter[str]
    _examples: Callable[[Counter[str]], Iterator[Encoded]]

    def __iter__(self) -> Iterator[Encoded]:
        self.outcomes.clear()
        return self._examples(self.outcomes)


def stream(
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
    truncation: Truncation = "drop",
    cache_tokens: bool = True,
    seed: int = 0,
    task_type: TaskName = "CAUSAL_LM",
    kept_prompts: int = 16,
) -> ExampleStream:
    """Do what `bonetune.data.prepare` does with rows read as they are needed, and check the first `HEAD` examples.

    Several data sets are interleaved by `dataset_weights`, as `bonetune.data.interleaving.interleaved` says. Held-out rows are
    those of `eval_dataset_name`, read whole, and kept if `cache_tokens`. `seed` changes nothing.

    Raises:
        InputError: as `prepare`; besides truncation: error, eval_size and SEQ_CLS, which need to have seen all rows.
    """
    if truncation == "error":
        raise InputError("streaming cannot know of long examples beforehand (truncation: error): choose drop, left or right.")
    if eval_size is not None:
        raise InputError("eval_size needs all rows, and streaming reads them as they are needed: name an eval_dataset_name.")
    if task_type == "SEQ_CLS":
        raise InputError(
            "A classifier's classes are found in all rows: turn streaming off, which reads them as they are needed."
        )
    told = {"dataset_field": dataset_field, "template": prompt_template, "kind": dataset_format, "task_type": task_type}
    names = source_names(dataset_name, dataset_weights)
    formats = tuple(detected(name, next(stream_rows(name, dataset_split)), told) for name in names)
    settings: dict[str, Any] = {
        "max_length": max_length,
        "truncation": truncation,
        "completion_only_loss": completion_only_loss,
        "task_type": task_type,
    }

    def examples_of(name: str, row_format: RowFormat, outcomes: Counter[str]) -> Iterator[Encoded]:
        with naming(name):
            before = outcomes["silenced"]
            examples = encode_stream(stream_rows(name, dataset_split), row_format, tokenizer, **settings, outcomes=outcomes)
            none = True
            for example in examples:
                none = False
                yield example
            if none and outcomes["silenced"] > before:
                raise InputError(
                    f"No example has a supervised token left when cut to max_length={max_length} (truncation: {truncation}): "
                    "raise max_length."
                )
            if none:
                raise InputError(f"No example is of at most max_length={max_length} tokens: raise max_length.")

    def mixed(outcomes: Counter[str]) -> Iterator[tuple[int, Encoded]]:
        streams = [partial(examples_of, name, row_format, outcomes) for name, row_format in zip(names, formats, strict=True)]
        return interleaved(streams, dataset_weights)

    def learned(outcomes: Counter[str]) -> Iterator[Encoded]:
        for _, example in mixed(outcomes):
            if task_type == "CAUSAL_LM" and not example.supervised:
                outcomes["unsupervised"] += 1
            else:
                yield example

    of_head = Counter[str]()
    first = list(islice(mixed(of_head), HEAD))
    evaluation = None
    if eval_dataset_name is not None:
        held_out = read_rows(eval_dataset_name, eval_dataset_split)
        encode = Encode(tokenizer, cache_tokens, settings)
        evaluation, _ = encode(eval_dataset_name, held_out, detected(eval_dataset_name, held_out[0], told))
    head, sources = EncodedSet(example for _, example in first), np.asarray([source for source, _ in first])
    lengths = Lengths.of(head, task_type, **counts_of(of_head))
    findings = check(
        head,
        tokenizer,
        lengths=lengths,
        max_length=max_length,
        task_type=task_type,
        evaluation=evaluation,
        sources=sources,
        names=names,
        kinds=[row_format.kind for row_format in formats],
    )
    needed = [int(max(head.rows[sources == n][:kept_prompts], default=0)) for n in range(len(names))]
    rows_of = [list(islice(stream_rows(name, dataset_split), count)) for name, count in zip(names, needed, strict=True)]
    prompts = prompts_of(head.rows, sources, rows_of, formats, tokenizer, kept_prompts)
    opened = formats[0].is_conversation(rows_of[0][0]) if rows_of[0] else False
    return ExampleStream(head, evaluation, lengths, findings, prompts, opened, formats, Counter(), learned)
