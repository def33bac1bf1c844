"""The comparison's files of numbers: runs.csv, curves.csv, items.csv, results.json; and its tables in Markdown."""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bonetune.experiments.curves import Curve
from bonetune.experiments.findings import FORGETTING, Analysis, Difference, MethodResult, Test, Tried
from bonetune.experiments.outcome import Outcome
from bonetune.experiments.sentences import READING
from bonetune.experiments.wording import (
    bytes_text,
    count_text,
    interval_text,
    p_text,
    rate_text,
    score_text,
    seconds_text,
    unit,
)
from bonetune.files import write_text

RESULTS_FILE, RUNS_FILE, CURVES_FILE, ITEMS_FILE = "results.json", "runs.csv", "curves.csv", "items.csv"
MARKDOWN_FILE = "results.md"
TABLE_FILES = (RESULTS_FILE, RUNS_FILE, CURVES_FILE, ITEMS_FILE, MARKDOWN_FILE)
_CURVE = ("step", "tokens", "seconds", "loss", "grad_norm")
_RUN = (
    "r",
    "trainable_parameters",
    "init_seconds",
    "train_seconds",
    "step_seconds",
    "peak_memory_bytes",
    "saved_bytes",
    "validation",
    "base_text_loss",
    "text_loss",
    "forgetting",
)


def write_tables(folder: Path, found: Analysis, outcomes: Sequence[Outcome], curves: Mapping[str, Mapping[int, Curve]]) -> None:
    """Write the files to a folder.

    Args:
        folder: the comparison's.
        found: what it found.
        outcomes: of all runs, those that chose the rates included.
        curves: the logged training steps of the runs that count: method, seed.
    """
    text = json.dumps(found.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    for name, content in (
        (RUNS_FILE, runs_csv(found, outcomes)),
        (CURVES_FILE, curves_csv(curves)),
        (ITEMS_FILE, items_csv(found, outcomes)),
        (MARKDOWN_FILE, markdown(found)),
        (RESULTS_FILE, text),
    ):
        write_text(folder / name, content.encode(errors="replace").decode())


def runs_csv(found: Analysis, outcomes: Sequence[Outcome]) -> str:
    """A line a run: what it was, what it took, how it scored. `counts` tells runs that count from those that chose a rate."""
    tests = [test.name for test in found.tests if test.name != FORGETTING]
    header = ["method", "learning_rate", "seed", "counts", *_RUN]
    header += [name for test in tests for name in (test, f"{test} low", f"{test} high")]
    rows = []
    for outcome in _ordered(found, outcomes):
        trial, row = outcome.trial, []
        for test in tests:
            result = outcome.results.get(test)
            row += [None, None, None] if result is None else [result.score, *(result.interval or (None, None))]
        counts = trial.seed != found.question.sweep_seed
        known = [getattr(outcome, name) for name in _RUN]
        end = [outcome.failure, outcome.environment.get("commit"), outcome.identity]
        rows.append([trial.method, trial.learning_rate, trial.seed, int(counts), *known, *row, *end])
    return _csv([*header, "failure", "commit", "identity"], rows)


def curves_csv(curves: Mapping[str, Mapping[int, Curve]]) -> str:
    """A line a logged training step of the runs that count."""
    rows = (
        [method, seed, *(line.get(name) for name in _CURVE)]
        for method, runs in curves.items()
        for seed, lines in sorted(runs.items())
        for line in lines
    )
    return _csv(["method", "seed", *_CURVE], rows)


def items_csv(found: Analysis, outcomes: Sequence[Outcome]) -> str:
    """A line an item of a test, of the runs that count, where the record tells what the item adds to the score."""
    rows = []
    for outcome in _ordered(found, outcomes):
        for test, result in outcome.results.items():
            for record in result.records:
                value = next((record[name] for name in ("correct", "loss", "score") if name in record), None)
                if value is not None:
                    weight = record.get("supervised_tokens", 1)
                    rows.append([outcome.trial.method, outcome.trial.seed, test, record.get("row"), value, weight])
    return _csv(["method", "seed", "test", "row", "value", "weight"], rows)


def _ordered(found: Analysis, outcomes: Sequence[Outcome]) -> list[Outcome]:
    place = {name: number for number, name in enumerate(found.question.methods)}
    return sorted(outcomes, key=lambda o: (place.get(o.trial.method, len(place)), o.trial.seed, o.trial.learning_rate))


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([int(cell) if isinstance(cell, bool) else cell for cell in row] for row in rows)
    return file.getvalue()


def markdown(found: Analysis) -> str:
    """The summary and the tables, for a page of documentation."""
    question = found.question
    parts = [f"# {question.title or 'Comparison of fine-tuning methods'}"]
    parts += [question.description] if question.description else []
    parts += ["\n".join(f"* {sentence}" for sentence in found.summary)]
    if found.tests:
        parts += ["## What was learned", _learned(found), "\n".join(f"* {_about(test)}" for test in found.tests)]
    for reference in dict.fromkeys(question.references):
        tables = [(test, rows) for test in found.tests if (rows := found.against(reference, test.name))]
        if tables:
            parts += [f"## Differences to {_code(reference)}"]
            parts += [part for test, rows in tables for part in (f"{_in_unit(test)}:", _differences(found, test, rows))]
    if rates := columns_of_sweep(found):
        swept = [method for method in found.methods if method.sweep]
        header = ["method", *map(rate_text, rates)]
        rows = [
            [_code(method.name), *(_bold(tried(method, rate), rate == method.learning_rate) for rate in rates)]
            for method in swept
        ]
        way = "higher" if found.validation_higher_is_better else "lower"
        note = f"Validation score of seed {question.sweep_seed}, {way} is better; in bold, the rate chosen."
        parts += ["## Choosing the learning rate", note, _table(header, rows)]
    parts += ["## Costs", _costs(found), "Medians over seeds; memory and files: the most."]
    parts += ["## How to read the differences", *READING]
    if found.remarks:
        parts += ["## Remarks", "\n".join(f"* {remark}" for remark in found.remarks)]
    shared = found.environment.shared
    if shared:
        parts += ["Made with " + ", ".join(f"{name} {value}" for name, value in shared.items() if value != "none") + "."]
    if question.command:
        parts += [f"    {question.command}"]
    return "\n\n".join(parts) + "\n"


def columns_of_sweep(found: Analysis) -> list[float]:
    """All rates that a method was tried at."""
    return sorted({one.learning_rate for method in found.methods for one in method.sweep})


def tried(method: MethodResult, rate: float) -> str:
    """What a method's sweep found at a rate."""
    one: Tried | None = next((one for one in method.sweep if one.learning_rate == rate), None)
    if one is None:
        return ""
    return "diverged" if one.validation is None else f"{one.validation:.4f}"


def _about(test: Test) -> str:
    protocol = test.protocol.removeprefix(f"{test.name}: ")
    return f"{_in_unit(test)}, {'higher' if test.higher_is_better else 'lower'} is better{f': {protocol}' if protocol else ''}."


def _in_unit(test: Test) -> str:
    word = unit(test.kind, difference=True)
    return f"{_code(test.name)}{f' ({word})' if word else ''}"


def _learned(found: Analysis) -> str:
    header = ["method", "r", "trainable parameters", "learning rate"]
    for test in found.tests:
        header += [test.name, "95%, t over seeds", f"by seed: {', '.join(map(str, found.question.seeds))}"]
    rows = []
    for method in found.methods:
        row = [
            _code(method.name),
            count_text(method.r),
            count_text(method.trainable_parameters),
            rate_text(method.learning_rate),
        ]
        for test in found.tests:
            values = method.scores.get(test.name)
            by_seed = {} if values is None else values.by_seed
            row += [
                score_text(values.mean if values else None, test.kind),
                interval_text(values.interval if values else None, test.kind),
            ]
            row += [", ".join(score_text(by_seed.get(seed), test.kind) for seed in found.question.seeds)]
        rows.append(row)
    return _table(header, rows)


def _differences(found: Analysis, test: Test, rows: Sequence[Difference]) -> str:
    share = any(row.only_method is not None for row in rows)
    header = ["method", "difference", "95%, t over seeds", "verdict", "p", "p, Holm", "by seed", "95%, bootstrap"]
    header += ["items won : lost", "McNemar p"] if share else []
    lines = []
    for row in rows:
        seeds = ", ".join(f"{seed}: {score_text(value, test.kind, signed=True)}" for seed, value in row.by_seed.items())
        line = [
            _code(row.method),
            score_text(row.mean, test.kind, signed=True),
            interval_text(row.interval, test.kind, signed=True),
        ]
        line += [
            row.verdict,
            p_text(row.p),
            p_text(row.adjusted_p),
            seeds,
            interval_text(row.bootstrap, test.kind, signed=True),
        ]
        line += [f"{count_text(row.only_method)} : {count_text(row.only_reference)}", p_text(row.mcnemar_p)] if share else []
        lines.append(line)
    return _table(header, lines)


def _costs(found: Analysis) -> str:
    header = ["method", "initialization", "one step", "training", "peak memory", "saved"]
    rows = [
        [
            _code(method.name),
            seconds_text(method.init_seconds.median if method.init_seconds else None),
            seconds_text(method.step_seconds.median if method.step_seconds else None),
            seconds_text(method.train_seconds.median if method.train_seconds else None),
            bytes_text(method.peak_memory_bytes),
            bytes_text(method.saved_bytes),
        ]
        for method in found.methods
    ]
    return _table(header, rows)


def _bold(text: str, chosen: bool) -> str:
    return f"**{text}**" if chosen and text else text


def _code(name: str) -> str:
    return f"`{name.replace('`', chr(39))}`"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (header, *rows)]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([lines[0], "| " + " | ".join("-" * width for width in widths) + " |", *lines[1:]])
