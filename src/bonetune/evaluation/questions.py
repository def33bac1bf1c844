"""Protocols that put questions, read greedy answers and judge each: what they have in common."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bonetune.errors import InputError
from bonetune.evaluation.ledger import Ledger
from bonetune.evaluation.result import Record, TaskResult
from bonetune.evaluation.rows import cut_off
from bonetune.evaluation.statistics import Proportion
from bonetune.evaluation.task import Prepared, Request, Task, digest
from bonetune.models import Answer, Loaded, generate_batches

Prompts = Callable[[Sequence[Record], Request], list[str]]


@dataclass(frozen=True)
class Protocol:
    """How a benchmark's questions are put and its answers read.

    Args:
        name: as `--tasks` takes it.
        description: the rest of the full name: prompt, decoding, extraction, rule.
        fields: the fields that each row must have as text.
        prompts: all rows to their prompts.
        judge: an answer and its row to what is recorded of it: `answer` (what was read out of it), `expected` and `correct`,
            and whatever else there is to see.
        max_new_tokens: longest answer.
        stop: texts at which an answer ends.
        source: the data set of the hub that is scored where the user names no data.
        split: of it.
        also: further truth values of a record, the shares of which are metrics.
        check: raises `InputError` for a row whose reference cannot be read.
        cut_left: whether a prompt that is too long loses its beginning; else it is an error.
        heeds: those of the user's `CHOICES` that mean something to it.
    """

    name: str
    description: str
    fields: tuple[str, ...]
    prompts: Prompts
    judge: Callable[[str, Record], Record]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    source: str | None = None
    split: str = "test"
    also: tuple[str, ...] = ()
    check: Callable[[Record], Any] | None = None
    cut_left: bool = False
    heeds: tuple[str, ...] = ("prompt_template",)

    @property
    def task(self) -> Task:
        """The protocol as a task."""
        return Task(self.name, self.prepare, heeds=self.heeds)

    def prepare(self, request: Request) -> Prepared:
        """Read and check the rows, and put the questions."""
        rows = request.rows(self.name, self.source, self.split)
        for number, row in enumerate(rows, 1):
            self._check(row, number)
        prompts = self.prompts(rows, request)
        most = request.max_new_tokens or self.max_new_tokens
        put = {"prompts": digest(prompts), "max_new_tokens": most, "batch_size": request.batch_size, "stop": self.stop}

        def run(loaded: Loaded, ledger: Ledger) -> TaskResult:
            batches = generate_batches(
                loaded.model,
                loaded.tokenizer,
                prompts,
                max_new_tokens=most,
                batch_size=request.batch_size,
                stop=self.stop,
                cut_left=self.cut_left,
                done=[row - 1 for row in ledger.records],
            )
            for batch in batches:
                new = {number: answer for number, answer in batch.items() if number + 1 not in ledger.records}
                ledger.add([self._record(number, prompts[number], answer, rows[number]) for number, answer in new.items()])
            return self._result(ledger.ordered, most)

        return Prepared(len(rows), {"rows": digest(rows)} | put, run)

    def _check(self, row: Record, number: int) -> None:
        for name in self.fields:
            if not isinstance(row.get(name), str):
                found = "has no" if name not in row else f"holds {row[name]!r:.40} as its"
                raise InputError(
                    f"{self.name}: row {number} {found} {name!r}, a text: its rows have the fields {', '.join(self.fields)}, "
                    f"this one has {', '.join(row) or 'none'}."
                )
        if self.check is not None:
            try:
                self.check(row)
            except InputError as error:
                raise InputError(f"{self.name}: row {number}: {error}") from error

    def _record(self, number: int, prompt: str, answer: Answer, row: Record) -> Record:
        told = {"row": number + 1, "prompt": prompt, "output": answer.text, "complete": answer.complete}
        return told | self.judge(answer.text, row)

    def _result(self, records: list[Record], most: int) -> TaskResult:
        share = Proportion.of([record["correct"] for record in records])
        metrics = cut_off(records)
        for name in self.also:
            other = Proportion.of([record[name] for record in records])
            low, high = other.interval
            metrics |= {name: other.value, f"{name}_low": low, f"{name}_high": high}
        protocol = f"{self.name}: {self.description}; greedy, at most {most} new tokens"
        return TaskResult(self.name, share.value, share.interval, share.total, records, metrics, protocol)


def each(prompt: Callable[[Record, Request], str]) -> Prompts:
    """The prompts of rows that are put one by one."""
    return lambda rows, request: [prompt(row, request) for row in rows]


def templated(request: Request, template: str, question: str) -> str:
    """A question in the user's prompt template, else in the protocol's."""
    chosen = request.prompt_template or template
    if "{instruction}" not in chosen:
        raise InputError(f"prompt_template {chosen!r:.60} lacks {{instruction}}: every prompt would be the same.")
    return chosen.replace("{instruction}", question)
