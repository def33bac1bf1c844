"""What the runs of a comparison show, and what they do not: pure functions from outcomes to numbers."""

import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from bonetune.evaluation.result import TaskResult
from bonetune.evaluation.statistics import crossed_bootstrap, holm, sign_test, t_interval, t_test
from bonetune.experiments.findings import (
    BETTER,
    BROKEN,
    FORGETTING,
    NO_SPREAD,
    NONE_FOUND,
    TOO_FEW,
    WORSE,
    Analysis,
    Difference,
    Environment,
    Kept,
    Kind,
    MethodResult,
    Question,
    Spread,
    Summary,
    Test,
    Tried,
)
from bonetune.experiments.outcome import Outcome, finite
from bonetune.experiments.sentences import remarks, summary

LEVEL = 0.05
FEWEST_SEEDS = 3
# Differences smaller than this are rounding: scores are computed from the same items in the same way.
_NOUGHT = 1e-12
# What a record says of the item itself, the same whatever was answered.
_OF_ITEMS = ("row", "supervised_tokens", "task", "prompt", "questions", "expected")

Sweeps = Mapping[str, Mapping[float, Outcome]]
Counting = Mapping[str, Mapping[int, Outcome]]
Items = tuple[np.ndarray, np.ndarray]


def analyse(question: Question, sweeps: Sweeps, rates: Mapping[str, float], counting: Counting) -> Analysis:
    """What the runs show.

    Args:
        question: what was asked.
        sweeps: runs by which the rates were chosen: method, rate.
        rates: the rates chosen.
        counting: runs that count: method, seed.
    """
    methods = [
        _method(question, name, sweeps.get(name, {}), rates.get(name), counting.get(name, {})) for name in question.methods
    ]
    everything = [outcome for runs in (*sweeps.values(), *counting.values()) for outcome in runs.values()]
    tests = _tests([outcome for name in question.methods for outcome in _finite(counting.get(name, {})).values()])
    found = Analysis(
        question=question,
        validation_higher_is_better=any(outcome.validation_higher_is_better for outcome in everything),
        tests=tests,
        methods=methods,
        differences=[difference for test in tests for difference in _differences(question, test, counting)],
        environment=_environment(everything),
        runs=len(everything),
        remarks=[],
        summary=[],
    )
    return replace(found, remarks=remarks(found, _unlike(question, tests, counting)), summary=summary(found))


def _finite(runs: Mapping[int, Outcome]) -> dict[int, Outcome]:
    """The runs that came to a finite end, by ascending seed."""
    return {seed: outcome for seed, outcome in sorted(runs.items()) if _failure(outcome) is None}


def _failure(outcome: Outcome) -> str | None:
    """Why a run does not count, if it does not."""
    if outcome.failure is not None:
        return outcome.failure
    infinite = [f"score in {name}" for name, result in outcome.results.items() if not math.isfinite(result.score)]
    if outcome.text_loss is not None and not math.isfinite(outcome.text_loss):
        infinite.append("loss on plain text")
    return f"its {infinite[0]} is not finite" if infinite else None


def _method(
    question: Question, name: str, sweep: Mapping[float, Outcome], rate: float | None, runs: Mapping[int, Outcome]
) -> MethodResult:
    done = _finite(runs)
    outcomes = list(done.values())
    known = next((o for o in (*outcomes, *sweep.values(), *runs.values()) if o.trainable_parameters), None)
    tests = dict.fromkeys(test for outcome in outcomes for test in (*outcome.results, FORGETTING))
    scores = {test: Summary.of({s: v for s, o in done.items() if (v := _score(o, test)) is not None}) for test in tests}
    tried = [Tried(r, finite(o.validation), o.failure) for r, o in sorted(sweep.items())]
    around = [one.learning_rate for one in tried]
    return MethodResult(
        name=name,
        described=question.methods[name],
        r=known.r if known else None,
        trainable_parameters=known.trainable_parameters if known else None,
        learning_rate=rate,
        rate_of=question.rate_of.get(name),
        sweep=tried,
        inside=(rate is not None and around[0] < rate < around[-1]) if len(around) > 1 else None,
        seeds=list(done),
        failures={seed: why for seed, o in sorted(runs.items()) if (why := _failure(o)) is not None},
        scores={test: values for test, values in scores.items() if values is not None},
        kept=_kept(done),
        init_seconds=Spread.of([o.init_seconds for o in outcomes]),
        step_seconds=Spread.of([o.step_seconds for o in outcomes]),
        train_seconds=Spread.of([o.train_seconds for o in outcomes]),
        peak_memory_bytes=max((o.peak_memory_bytes for o in outcomes), default=None),
        saved_bytes=max((o.saved_bytes for o in outcomes), default=None),
    )


def _score(outcome: Outcome, test: str) -> float | None:
    if test == FORGETTING and test not in outcome.results:
        return finite(outcome.forgetting)
    return outcome.results[test].score if test in outcome.results else None


def _kept(done: Mapping[int, Outcome]) -> list[Kept]:
    curve = []
    for scale in sorted({point.scale for outcome in done.values() for point in outcome.scaled}):
        here = {seed: (o, p) for seed, o in done.items() for p in o.scaled if p.scale == scale}
        score = Summary.of({seed: value for seed, (_, p) in here.items() if (value := finite(p.score)) is not None})
        rises = {
            s: p.text_loss - o.base_text_loss
            for s, (o, p) in here.items()
            if p.text_loss is not None and o.base_text_loss is not None
        }
        if score is not None:
            curve.append(Kept(scale, score, Summary.of({seed: rise for seed, rise in rises.items() if math.isfinite(rise)})))
    return curve


def _tests(outcomes: Sequence[Outcome]) -> list[Test]:
    found: dict[str, Test] = {}
    for outcome in outcomes:
        for name, result in outcome.results.items():
            found.setdefault(name, Test(name, result.protocol, result.higher_is_better, _kind(result), result.items))
    if FORGETTING not in found and any(finite(outcome.forgetting) is not None for outcome in outcomes):
        protocol = "forgetting: loss on held-out plain text less the base model's, in nats a token"
        found[FORGETTING] = Test(FORGETTING, protocol, higher_is_better=False, kind="rise")
    return list(found.values())


def _kind(result: TaskResult) -> Kind:
    if result.task == FORGETTING:
        return "rise"
    if _items(result) is None:
        return "number"
    return "share" if "correct" in result.records[0] else "loss" if "loss" in result.records[0] else "number"


def _items(result: TaskResult) -> Items | None:
    """What each item adds to the score, and how much it counts; None where the score is no ratio of such sums."""
    records = result.records
    for name, weight in (("correct", None), ("loss", "supervised_tokens"), ("score", None)):
        if not records or any(name not in record or (weight and weight not in record) for record in records):
            continue
        weights = np.array([float(record[weight]) if weight else 1.0 for record in records])
        values = np.array([float(record[name]) for record in records]) * weights
        if weights.sum() > 0 and math.isclose(values.sum() / weights.sum(), result.score, rel_tol=1e-6, abs_tol=1e-9):
            return values, weights
    return None


def _differences(question: Question, test: Test, counting: Counting) -> list[Difference]:
    """To each reference, of every other method that shares a seed with it.

    All pairs by a test are one family of Holm's. Two references are compared once, among the differences to the first of them;
    those to the second take that over.
    """
    references, own = list(dict.fromkeys(question.references)), {}
    for place, reference in enumerate(references):
        for name in question.methods:
            if name not in references[: place + 1] and (found := _difference(name, reference, test, counting)) is not None:
                own[name, reference] = found
    adjusted = holm({pair: d.p for pair, d in own.items() if d.p is not None})
    judged = {pair: _judged(d, adjusted.get(pair), test) for pair, d in own.items()}
    judged |= {(b, a): _mirrored(judged[a, b]) for a, b in own if a in references}
    return [judged[name, reference] for reference in references for name in question.methods if (name, reference) in judged]


def _difference(method: str, reference: str, test: Test, counting: Counting) -> Difference | None:
    mine, others = _finite(counting.get(method, {})), _finite(counting.get(reference, {}))
    by_seed: dict[int, float] = {}
    pairs = []
    for seed in (seed for seed in mine if seed in others):
        a, b = _score(mine[seed], test.name), _score(others[seed], test.name)
        if a is None or b is None:
            continue
        by_seed[seed] = 0.0 if abs(a - b) <= _NOUGHT * max(abs(a), abs(b)) else a - b
        pairs.append((mine[seed].results.get(test.name), others[seed].results.get(test.name)))
    if not by_seed:
        return None
    values, items = list(by_seed.values()), _paired(pairs)
    broken = any(_finite(counting[name]).keys() != counting[name].keys() for name in (method, reference))
    only_method = only_reference = mcnemar = bootstrap = None
    if items is not None:
        ours, theirs, weights = items
        bootstrap = crossed_bootstrap(ours - theirs, weights) if len(values) > 1 else None
        if test.kind == "share":
            net = (ours > 0).sum(0) - (theirs > 0).sum(0)  # seeds by which an item speaks for the method
            only_method, only_reference = int((net > 0).sum()), int((net < 0).sum())
            mcnemar = sign_test((net < 0).tolist(), (net > 0).tolist())
    enough = len(values) >= FEWEST_SEEDS
    p = t_test(values) if enough and not broken else None
    return Difference(
        method=method,
        reference=reference,
        test=test.name,
        by_seed=by_seed,
        mean=statistics.fmean(values),
        interval=t_interval(values),
        bootstrap=bootstrap,
        p=p,
        adjusted_p=None,
        only_method=only_method,
        only_reference=only_reference,
        mcnemar_p=mcnemar,
        verdict=BROKEN if broken else NO_SPREAD if enough else TOO_FEW,  # unless `_judged` finds a p to judge by
    )


def _paired(
    pairs: Sequence[tuple[TaskResult | None, TaskResult | None]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """What each item adds to the scores of two methods, and how much it counts, (seeds, items) each.

    None where the items do not make the scores, or are not the same items for both methods and all seeds.
    """
    results = [result for pair in pairs for result in pair]
    first = results[0]
    if first is None or any(result is None or not _same_items(result, first) for result in results):
        return None
    found = [items for result in results if result is not None and (items := _items(result)) is not None]
    if len(found) < len(results) or any(not np.array_equal(weights, found[0][1]) for _, weights in found):
        return None
    values, weights = (np.stack(part) for part in zip(*found, strict=True))
    return values[::2], values[1::2], weights[::2]


def _same_items(mine: TaskResult, other: TaskResult) -> bool:
    if len(mine.records) != len(other.records):
        return False
    # what one of them does not tell is not held against it
    pairs = zip(mine.records, other.records, strict=True)
    return all(a[name] == b[name] for a, b in pairs for name in _OF_ITEMS if name in a and name in b)


def _judged(difference: Difference, adjusted: float | None, test: Test) -> Difference:
    if adjusted is None:
        return difference
    if adjusted > LEVEL:
        return replace(difference, adjusted_p=adjusted, verdict=NONE_FOUND)
    good = (difference.mean > 0) == test.higher_is_better
    return replace(difference, adjusted_p=adjusted, verdict=BETTER if good else WORSE)


def _mirrored(difference: Difference) -> Difference:
    """The same with method and reference exchanged."""
    intervals = {
        name: None if (interval := getattr(difference, name)) is None else (-interval[1], -interval[0])
        for name in ("interval", "bootstrap")
    }
    return replace(
        difference,
        method=difference.reference,
        reference=difference.method,
        by_seed={seed: -value for seed, value in difference.by_seed.items()},
        mean=-difference.mean,
        only_method=difference.only_reference,
        only_reference=difference.only_method,
        verdict={BETTER: WORSE, WORSE: BETTER}.get(difference.verdict, difference.verdict),
        **intervals,
    )


def _unlike(question: Question, tests: Sequence[Test], counting: Counting) -> dict[str, list[int]]:
    """Seeds with which not all methods were examined on the same items, by test."""
    found: dict[str, list[int]] = {}
    for test in tests:
        first: dict[int, TaskResult] = {}
        for name in question.methods:
            for seed, outcome in _finite(counting.get(name, {})).items():
                result = outcome.results.get(test.name)
                if result is not None and not _same_items(result, first.setdefault(seed, result)):
                    seeds = found.setdefault(test.name, [])
                    seeds += [seed] if seed not in seeds else []
    return found


def _environment(outcomes: Sequence[Outcome]) -> Environment:
    names = dict.fromkeys(name for outcome in outcomes for name in outcome.environment)
    counts = {name: Counter(_in_words(outcome.environment.get(name)) for outcome in outcomes) for name in names}
    shared = {name: next(iter(values)) for name, values in counts.items() if len(values) == 1}
    return Environment(shared, {name: dict(values.most_common()) for name, values in counts.items() if len(values) > 1})


def _in_words(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        return ", ".join(map(_in_words, value)) or "none"
    if value is None or isinstance(value, bool):
        return "none" if value is None else "yes" if value else "no"
    return json.dumps(value)
