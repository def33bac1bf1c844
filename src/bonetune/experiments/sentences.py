"""What a comparison found, in sentences: the summary, which claims no more than the numbers hold, and the remarks."""

from collections.abc import Mapping, Sequence

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
    MethodResult,
    Test,
)
from bonetune.experiments.wording import (
    bytes_text,
    count_text,
    listed,
    quoted,
    rate_text,
    ratio_text,
    score_text,
    seconds_text,
    unit,
)

# Trainable parameters further from the reference's than this are remarked on.
UNMATCHED = 0.05
# More names than this are counted in the first sentence.
_NAMED = 4
# Verdicts that decide nothing, in words.
_UNDECIDED = {
    TOO_FEW: TOO_FEW,
    NO_SPREAD: "no spread to judge by, as every seed differs by the same",
    BROKEN: "not decided, as a run diverged",
}
# By how much is said of so many methods, those furthest from the reference.
_AMOUNTS = 3
RULE = (
    "A method is called better or worse than a reference if a paired t-test over the seeds tells them apart at 5%, after "
    "Holm's correction for all comparisons by that test. It takes three seeds at least, no run of either that diverged, and a "
    "spread: where every seed differs by the same, and not by 0, there is no spread to judge by. The first test decides; the "
    "others are each judged at 5% of their own, so that of many of them one may differ by chance. Everything else is no "
    "difference found, which is not the same as being equal: the interval says how large a difference may have gone unseen."
)
_PAIRING = (
    "Each difference is the method minus the reference, on the same test items with the same seed: the mean over the seeds "
    "that both have. The items of a seed share one trained model, so what repeats is the seed, and the interval to rely on is "
    "Student's t over the seeds' differences. It is wide, for few seeds say little. Two references are compared once, and "
    "that comparison is shown with both."
)
_OTHERS = (
    "The bootstrap draws seeds and items, one draw of items for all seeds. It knows no more seeds than there are and is too "
    "narrow where seeds differ. An item is won by a method that got it right with more seeds than the reference, and lost by "
    "one that did with fewer; McNemar's exact test is of these two counts. It takes the trained models as given: it says if "
    "these models differ on items such as these, not whether the methods do."
)
_NOT_COVERED = (
    "No interval covers the choice of the learning rate, made on one seed, and none is widened for the number of comparisons. "
    "Times are of the machine as it was; runs made side by side slow each other down. A dash stands for what is not measured, "
    "too few seeds, or seeds that agree to the last digit and leave no spread to judge by."
)
READING = (RULE, _PAIRING, _OTHERS, _NOT_COVERED)


def summary(found: Analysis) -> list[str]:
    """What the runs show, the most important first."""
    if not found.tests or not any(method.seeds for method in found.methods):
        return ["No run that counts has come to a finite end: there is nothing to say yet."]
    first, *others = ([_against(found, test, reference) for reference in _references(found)] for test in found.tests)
    told = [_headline(found), *_fallen(found), *first, _beside(found), *(sentence for told in others for sentence in told)]
    told += [_scores(found), _costs(found), _forgetting(found), _limits(found)]
    return [sentence for sentence in told if sentence]


def _references(found: Analysis) -> list[str]:
    return list(dict.fromkeys(found.question.references))


def _pairs(found: Analysis, test: Test, reference: str) -> list[Difference]:
    """The differences to a reference by a test, without those to the references before it, which have been told."""
    told = _references(found)
    told = told[: told.index(reference)]
    return [difference for difference in found.against(reference, test.name) if difference.method not in told]


def _headline(found: Analysis) -> str:
    """What the first test says."""
    test = found.tests[0]
    of_test = {name: _pairs(found, test, name) for name in _references(found)}
    pairs = [difference for own in of_test.values() for difference in own]
    if not pairs:
        return "There is nothing to compare: no two methods have a run with the same seed that came to a finite end."
    decided = [d for d in pairs if d.verdict not in _UNDECIDED]
    left = len(pairs) - len(decided)
    if not decided:
        return f"Nothing is decided: {_undecided(pairs)}."
    rest = f" {left} more {'is' if left == 1 else 'are'} not decided." if left else ""
    if not (told := _told_apart(of_test)):
        names = listed([quoted(name) for name, own in of_test.items() if own])
        where = "in the one comparison" if len(decided) == 1 else f"in any of {len(decided)} comparisons"
        return f"No difference found in {test.name}, {where} with {names}: no more than chance between seeds allows for.{rest}"
    none = sum(d.verdict == NONE_FOUND for d in decided)
    others = f" In {none} of {len(decided)} comparisons, no difference is found." if none else ""
    return f"In {test.name}, {told}.{others}{rest}"


def _beside(found: Analysis) -> str:
    """What the other tests tell apart."""
    told = {
        test.name: _told_apart({name: _pairs(found, test, name) for name in _references(found)}) for test in found.tests[1:]
    }
    parts = [f"in {name}, {words}" for name, words in told.items() if words]
    return f"Beside that, by tests each judged by itself: {'; '.join(parts)}." if parts else ""


def _fallen(found: Analysis) -> list[str]:
    """Methods of which no run that counts is left, and which no comparison can name."""
    rateless = [quoted(m.name) for m in found.methods if m.learning_rate is None and not m.seeds]
    broken = [quoted(m.name) for m in found.methods if m.learning_rate is not None and m.failures and not m.seeds]
    words = ((broken, "diverged with every seed"), (rateless, "diverged at every learning rate that was tried"))
    return [f"{listed(names)} {why}: compared with nothing." for names, why in words if names]


def _undecided(pairs: Sequence[Difference]) -> str:
    """Why none of them is decided."""
    reasons = {verdict: [len(d.by_seed) for d in pairs if d.verdict == verdict] for verdict in _UNDECIDED}
    if len(reasons[BROKEN]) == len(pairs):
        return "in every comparison, a run of one of the methods diverged"
    few = reasons[TOO_FEW]
    most = f"{'at most ' * (len(set(few)) > 1)}{max(few, default=0)} seed{'s' * (max(few, default=0) != 1)}"
    words = {
        TOO_FEW: f"methods share {most}, and it takes three to tell a difference",
        NO_SPREAD: "every seed differs by the same, which leaves no spread to judge by",
        BROKEN: "a run of one of the methods diverged",
    }
    told = [(len(own), words[verdict]) for verdict, own in reasons.items() if own]
    if len(told) == 1:
        return told[0][1]
    return "; ".join(f"in {count} comparison{'s' * (count != 1)}, {why}" for count, why in told)


def _told_apart(of_test: Mapping[str, Sequence[Difference]]) -> str:
    """Which methods are better or worse; none: empty."""
    parts = []
    for reference, pairs in of_test.items():
        for verdict in (BETTER, WORSE):
            names = [quoted(d.method) for d in pairs if d.verdict == verdict]
            if names:
                who = listed(names) if len(names) <= _NAMED else f"{len(names)} methods"
                parts.append(f"{who} {'is' if len(names) == 1 else 'are'} {verdict} than {quoted(reference)}")
    return listed(parts) if parts else ""


def _against(found: Analysis, test: Test, reference: str) -> str:
    pairs = _pairs(found, test, reference)
    if not pairs:
        return ""
    parts = []
    for verdict in (BETTER, WORSE):
        own = sorted((d for d in pairs if d.verdict == verdict), key=lambda d: -abs(d.mean))
        if own:
            amounts = ", ".join(f"{quoted(d.method)} {_by_how_much(d, test)}" for d in own[:_AMOUNTS])
            parts.append(f"{verdict}: {amounts}{f' and {len(own) - _AMOUNTS} more' if len(own) > _AMOUNTS else ''}")
    if none := [d for d in pairs if d.verdict == NONE_FOUND]:
        parts.append(f"no difference found: {listed([quoted(d.method) for d in none])}{_reach(none, test)}")
    for verdict, words in _UNDECIDED.items():
        if names := [quoted(d.method) for d in pairs if d.verdict == verdict]:
            parts.append(f"{words}: {listed(names)}")
    word = unit(test.kind, difference=True)
    return f"{test.name}{f' ({word})' if word else ''}, against {quoted(reference)}: {'; '.join(parts)}."


def _by_how_much(difference: Difference, test: Test) -> str:
    assert difference.interval is not None
    low, mean, high = (
        score_text(value, test.kind).removeprefix("+") for value in sorted(map(abs, (*difference.interval, difference.mean)))
    )
    return f"by {mean} (95%: {low} to {high})"


def _reach(differences: Sequence[Difference], test: Test) -> str:
    intervals = [d.interval for d in differences if d.interval is not None]
    if not intervals:
        return ""
    low, high = min(low for low, _ in intervals), max(high for _, high in intervals)
    whose = "its 95% interval reaches" if len(differences) == 1 else "their 95% intervals reach"
    return f" ({whose} from {score_text(low, test.kind, signed=True)} to {score_text(high, test.kind, signed=True)})"


def _scores(found: Analysis) -> str:
    test = found.tests[0]
    scored = [(method, values) for method in found.methods if (values := method.scores.get(test.name)) is not None]
    if len(scored) < 2 or test.name == FORGETTING:
        return ""
    scored.sort(key=lambda pair: pair[1].mean, reverse=test.higher_is_better)
    places = ", ".join(f"{quoted(method.name)} {score_text(values.mean, test.kind)}" for method, values in scored)
    word = f" ({word})" if (word := unit(test.kind)) else ""
    return f"Means over seeds in {test.name}{word}, best first: {places}. The order alone says little."


def _costs(found: Analysis) -> str:
    timed = [(m, m.step_seconds.median) for m in found.methods if m.step_seconds is not None and m.step_seconds.median > 0]
    if not timed:
        return ""
    base = next((pair for name in found.question.references for pair in timed if pair[0].name == name), timed[0])
    told = f"Cost: the median step of {quoted(base[0].name)} takes {seconds_text(base[1])}"
    others = [f"{quoted(m.name)} {ratio_text(seconds / base[1])}" for m, seconds in timed if m is not base[0]]
    told += f"; as multiples of it, {', '.join(others)}" if others else ""
    held = [m for m in found.methods if m.peak_memory_bytes]
    if held:
        least, most = (choose(held, key=lambda m: m.peak_memory_bytes or 0) for choose in (min, max))
        told += f". Peak memory: {_range(least, most, bytes_text(least.peak_memory_bytes), bytes_text(most.peak_memory_bytes))}"
    slow = [
        m
        for m in found.methods
        if m.init_seconds is not None and m.step_seconds and m.init_seconds.median > 20 * m.step_seconds.median
    ]
    if slow:
        words = listed([f"{quoted(m.name)} {seconds_text(m.init_seconds.median)}" for m in slow if m.init_seconds])
        told += f". Initialization that takes longer than twenty steps: {words}"
    return f"{told}."


def _range(least: MethodResult, most: MethodResult, low: str, high: str) -> str:
    return low if low == high else f"{low} ({quoted(least.name)}) to {high} ({quoted(most.name)})"


def _forgetting(found: Analysis) -> str:
    rises = [(method, method.forgetting) for method in found.methods if method.forgetting is not None]
    if not rises:
        return ""
    (least, low), (most, high) = (choose(rises, key=lambda pair: pair[1].mean) for choose in (min, max))
    if least is most:
        return f"Forgetting: the loss on plain text changes by {score_text(low.mean, 'rise')} nats a token."
    return (
        "Forgetting: the loss on plain text changes by "
        f"{_range(least, most, score_text(low.mean, 'rise'), score_text(high.mean, 'rise'))} nats a token, means over seeds."
    )


def _limits(found: Analysis) -> str:
    swept = any(len(method.sweep) > 1 for method in found.methods)
    seeds = len(found.question.seeds)
    told = f"Limits: one model and one set of data, {seeds} seed{'s' * (seeds != 1)}"
    rates = f", learning rates chosen on seed {found.question.sweep_seed} alone" if swept else ""
    return f"{told}{rates}. Nothing is said about others."


def remarks(found: Analysis, unlike: Mapping[str, Sequence[int]]) -> list[str]:
    """What is missing or unusual. `unlike`: seeds with which methods were examined on different items, by test."""
    told = [*found.question.notes]
    told += [sentence for method in found.methods for sentence in (*_sweep(found, method), *_missing(found, method))]
    told += _unmatched(found)
    for test, seeds in unlike.items():
        which = listed([str(seed) for seed in sorted(seeds)])
        told.append(
            f"Not all methods were examined by {test} on the same items with seed{'s' * (len(seeds) > 1)} {which}: those "
            "differences are not paired item by item."
        )
    for d in (d for test in found.tests for reference in _references(found) for d in _pairs(found, test, reference)):
        if d.verdict == NO_SPREAD:
            told.append(
                f"{d.test}: {quoted(d.method)} and {quoted(d.reference)} differ by the same with every seed, which leaves no "
                "spread to judge by."
            )
    environment = found.environment
    if "commit" in environment.shared and environment.shared["commit"] == "none":
        told.append("The runs do not say which commit they were made with.")
    for name, values in environment.varying.items():
        each = ", ".join(f"{value} ({count} run{'s' * (count != 1)})" for value, count in values.items())
        told.append(f"Not all runs have the same {name}: {each}.")
    return told


def _sweep(found: Analysis, method: MethodResult) -> list[str]:
    name = quoted(method.name)
    told = [
        f"{name} diverged at {rate_text(one.learning_rate)}, seed {found.question.sweep_seed}: {_ended(one.failure)}"
        for one in method.sweep
        if one.failure is not None
    ]
    if method.learning_rate is None:
        told.append(f"{name} has no learning rate: no run of its sweep came to a finite end.")
    elif method.inside is False:
        told.append(
            f"The best rate of {name}, {rate_text(method.learning_rate)}, lies at the edge of its grid: a better one may lie "
            "beyond."
        )
    elif method.inside is None and method.rate_of is None:
        told.append(f"The rate of {name}, {rate_text(method.learning_rate)}, was given and not swept.")
    return told


def _missing(found: Analysis, method: MethodResult) -> list[str]:
    name = quoted(method.name)
    told = [
        f"{name} diverged with seed {seed}: {_ended(why)}{' Its means are of the other seeds.' if method.seeds else ''}"
        for seed, why in method.failures.items()
    ]
    absent = [str(seed) for seed in found.question.seeds if seed not in method.seeds and seed not in method.failures]
    if absent:
        told.append(f"{name} lacks seed{'s' * (len(absent) > 1)} {listed(absent)}.")
    for test in found.tests:
        lacking = [str(s) for s in method.seeds if test.name not in method.scores or s not in method.scores[test.name].by_seed]
        if lacking:
            told.append(f"{name} has no score in {test.name} with seed{'s' * (len(lacking) > 1)} {listed(lacking)}.")
    return told


def _ended(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _unmatched(found: Analysis) -> list[str]:
    counts = {method.name: method.trainable_parameters for method in found.methods if method.trainable_parameters}
    candidates = (found.question.matched_to, *found.question.references)
    reference = next((name for name in candidates if name in counts), None)
    if reference is None:
        return []
    told, target = [], counts[reference]
    for name, count in counts.items():
        off = count / target - 1
        if abs(off) > UNMATCHED:
            far = f"{count / target:,.1f} times the" if off > 1 else f"{abs(100 * off):.1f}% {'more' if off > 0 else 'fewer'}"
            tail = (
                f"{count_text(target)} of {quoted(reference)}"
                if off > 1
                else f"than the {count_text(target)} of {quoted(reference)}"
            )
            told.append(f"{quoted(name)} trains {count_text(count)} parameters, {far} {tail}.")
    return told
