import json
import math
from dataclasses import replace

import numpy as np
import pytest
from made_up_runs import ENVIRONMENT, Made, question
from scipy import stats

from bonetune.evaluation.result import TaskResult
from bonetune.evaluation.statistics import holm
from bonetune.experiments.analysis import analyse
from bonetune.experiments.findings import BETTER, BROKEN, NO_SPREAD, NONE_FOUND, TOO_FEW, WORSE


def analysed(made, references=("lora",), seeds=(1, 2, 3), **more):
    asked = question(made.effects, references, seeds, **more)
    return analyse(asked, made.sweeps, made.rates, made.counting)


def scores(made, name, test="loss"):
    return np.array([outcome.results[test].score for outcome in made.counting[name].values()])


def test_effects_that_are_there_are_found():
    made = Made({"bone": 0.1, "lora": 0.0, "bat": -0.1}, (1, 2, 3, 4, 5), noise=0.002, items=200)
    found = analysed(made, seeds=(1, 2, 3, 4, 5))
    for name, verdict in (("bone", BETTER), ("bat", WORSE)):
        for test in ("loss", "exact-match"):
            difference = found.between(name, "lora", test)
            assert difference.verdict == verdict
            assert difference.mean == pytest.approx((scores(made, name, test) - scores(made, "lora", test)).mean())
        low, high = found.between(name, "lora", "loss").interval
        assert low < -made.effects[name] < high
    assert "In loss, `bone` is better than `lora` and `bat` is worse than `lora`." in found.summary[0]
    assert "`bone` by 0.1" in found.summary[1]


def test_the_same_methods_are_seldom_told_apart():
    """Three methods that do alike: in at most about one of twenty comparisons with the reference is any called different."""
    false = 0
    for seed in range(150):
        found = analysed(Made({"lora": 0, "a": 0, "b": 0, "c": 0}, tests=["loss"], text=False, items=10, seed=seed))
        false += any(d.verdict != NONE_FOUND for d in found.differences)
    assert stats.binomtest(false, 150, 0.05, alternative="greater").pvalue > 1e-3


def test_no_effect_is_said_to_be_no_difference_found():
    found = analysed(Made({"lora": 0.0, "bone": 0.0}, text=False))
    assert {d.verdict for d in found.differences} == {NONE_FOUND}
    assert found.summary[0].startswith("No difference found in loss, in the one comparison with `lora`")
    assert "no difference found: `bone` (its 95% interval reaches from -" in found.summary[1]
    assert not any(" better than" in sentence or " worse than" in sentence for sentence in found.summary)


def test_a_difference_is_scipys_paired_test_over_seeds_adjusted_by_holm():
    made = Made({"a": 0.03, "lora": 0.0, "b": 0.02, "c": 0.001}, seeds=(1, 2, 3, 4), noise=0.004)
    found = analysed(made, seeds=(1, 2, 3, 4))
    p = {}
    for name in "abc":
        expected = stats.ttest_rel(scores(made, name), scores(made, "lora"))
        difference = found.between(name, "lora", "loss")
        assert difference.p == pytest.approx(expected.pvalue)
        assert difference.interval == pytest.approx(tuple(expected.confidence_interval(0.95)))
        p[name] = expected.pvalue
    ordered = sorted(p, key=p.get)
    for rank, name in enumerate(ordered):  # Holm by brute force
        adjusted = max(min(1, (3 - i) * p[other]) for i, other in enumerate(ordered[: rank + 1]))
        assert found.between(name, "lora", "loss").adjusted_p == pytest.approx(adjusted)
        assert (found.between(name, "lora", "loss").verdict != NONE_FOUND) == (adjusted <= 0.05)


def test_an_item_counts_for_the_method_that_got_it_right_with_more_seeds():
    made = Made({"bone": 0.1, "lora": 0.0})
    difference = analysed(made).between("bone", "lora", "exact-match")
    right = {
        name: sum(
            np.array([r["correct"] for r in made.counting[name][s].results["exact-match"].records]) * 1 for s in (1, 2, 3)
        )
        for name in ("bone", "lora")
    }
    only, other = int((right["bone"] > right["lora"]).sum()), int((right["lora"] > right["bone"]).sum())
    assert (difference.only_method, difference.only_reference) == (only, other)
    assert difference.mcnemar_p == pytest.approx(stats.binomtest(only, only + other, 0.5).pvalue)
    low, high = difference.bootstrap
    assert low < difference.mean < high
    assert analysed(made).between("bone", "lora", "loss").only_method is None


def test_two_references_are_compared_once_and_shown_with_both():
    found = analysed(Made({"bone": 0.1, "lora": 0.0, "bat": 0.05}, noise=0.002), ("lora", "bone"))
    for test in ("loss", "exact-match", "forgetting"):
        there, back = found.between("bone", "lora", test), found.between("lora", "bone", test)
        assert back.by_seed == {seed: -value for seed, value in there.by_seed.items()}
        assert (back.mean, back.p, back.adjusted_p) == (-there.mean, there.p, there.adjusted_p)
        assert back.interval == (-there.interval[1], -there.interval[0])
        assert back.only_method == there.only_reference
        assert {there.verdict, back.verdict} in ({BETTER, WORSE}, {NONE_FOUND})
        assert [d.method for d in found.against("bone", test)] == ["lora", "bat"]
        pairs = [there, found.between("bat", "lora", test), found.between("bat", "bone", test)]
        adjusted = holm({pair.method + pair.reference: pair.p for pair in pairs})  # one family
        assert [pair.adjusted_p for pair in pairs] == list(adjusted.values())
    assert sum("`lora`" in s and "against `bone`" in s for s in found.summary) == 0


def test_forgetting_is_a_difference_too():
    made = Made({"lora": 0.0, "bone": 0.0}, noise=0.0)
    found = analysed(made)
    difference = found.between("bone", "lora", "forgetting")
    assert difference.mean == pytest.approx(
        np.mean([made.counting["bone"][s].forgetting - made.counting["lora"][s].forgetting for s in (1, 2, 3)])
    )
    assert difference.verdict == WORSE
    assert difference.bootstrap is None
    assert any(s.startswith("Forgetting: the loss on plain text changes by +0.0") for s in found.summary)


def test_a_missing_seed_is_left_out_of_the_pairs_and_remarked():
    made = Made({"lora": 0.0, "bone": 0.05}, seeds=(1, 2, 3, 4))
    del made.counting["bone"][2]
    found = analysed(made, seeds=(1, 2, 3, 4))
    assert list(found.between("bone", "lora", "loss").by_seed) == [1, 3, 4]
    assert "`bone` lacks seed 2." in found.remarks


def test_a_run_that_diverged_decides_nothing_and_is_remarked():
    made = Made({"lora": 0.0, "bone": 0.2, "bat": 0.2}, noise=0.001, seeds=(1, 2, 3, 4)).diverge("bone", 3)
    found = analysed(made, seeds=(1, 2, 3, 4))
    difference = found.between("bone", "lora", "loss")
    assert difference.verdict == BROKEN
    assert (difference.p, difference.adjusted_p) == (None, None)
    assert list(difference.by_seed) == [1, 2, 4]
    assert found.between("bat", "lora", "loss").verdict == BETTER
    assert found.method("bone").failures == {3: "The loss of step 7 is nan"}
    assert any(remark.startswith("`bone` diverged with seed 3: The loss of step 7 is nan.") for remark in found.remarks)
    assert "not decided, as a run diverged: `bone`" in found.summary[1]


def test_a_method_without_a_run_left_is_named_in_the_summary():
    """One seed's divergence was told, that of all was not."""
    made = Made({"lora": 0.0, "bone": 0.0, "bat": 0.0})
    for seed in (1, 2, 3):
        made.diverge("bone", seed)
    found = analysed(made)
    assert "`bone` diverged with every seed: compared with nothing." in found.summary
    assert not any("Its means" in remark for remark in found.remarks)
    made.rates.pop("bat")
    made.counting["bat"] = {}
    assert "`bat` diverged at every learning rate that was tried: compared with nothing." in analysed(made).summary


def test_a_loss_on_plain_text_that_is_not_finite_is_a_run_that_diverged():
    found = analysed(Made({"lora": 0.0, "bone": 0.2}, (1, 2, 3, 4)).change("bone", 4, text_loss=math.inf), seeds=(1, 2, 3, 4))
    assert found.between("bone", "lora", "forgetting").verdict == BROKEN
    assert found.method("bone").failures == {4: "its loss on plain text is not finite"}


def test_the_items_of_seeds_are_the_same_items():
    """Seeds that agree on every item are no more evidence on items than one of them."""
    made = Made({"lora": 0.0, "bone": 0.05}, tests=["exact-match"])
    for name in ("lora", "bone"):
        first = made.counting[name][1].results["exact-match"]
        for seed in (2, 3):
            made.change(name, seed, results={"exact-match": first})
    one = Made({"lora": 0.0, "bone": 0.05}, tests=["exact-match"])
    for name in ("lora", "bone"):
        one.counting[name] = {1: made.counting[name][1]}
    difference, alone = (analysed(m).between("bone", "lora", "exact-match") for m in (made, one))
    assert difference.mcnemar_p == alone.mcnemar_p
    assert (difference.only_method, difference.only_reference) == (alone.only_method, alone.only_reference)


def test_the_first_test_makes_the_headline_and_the_others_stand_beside_it():
    made = Made({"lora": 0.0, "bone": 0.0}, (1, 2, 3, 4), noise=0.0001)  # alike in loss, and bone forgets more
    found = analysed(made, seeds=(1, 2, 3, 4))
    assert found.summary[0].startswith("No difference found in loss")
    assert "Beside that, by tests each judged by itself: in forgetting, `bone` is worse than `lora`." in found.summary


def test_a_score_that_is_not_finite_is_a_run_that_diverged():
    made = Made({"lora": 0.0, "bone": 0.2}, tests=["loss"])
    broken = replace(made.counting["bone"][1].results["loss"], score=math.nan)
    found = analysed(made.change("bone", 1, results={"loss": broken}))
    assert found.between("bone", "lora", "loss").verdict == BROKEN
    json.dumps(found.to_json(), allow_nan=False)


@pytest.mark.parametrize("seeds", [(1,), (1, 2)])
def test_few_seeds_decide_nothing(seeds):
    found = analysed(Made({"lora": 0.0, "bone": 0.3}, seeds, noise=0.0), seeds=seeds)
    assert {d.verdict for d in found.differences} == {TOO_FEW}
    many = "s" * (len(seeds) > 1)
    assert found.summary[0] == (
        f"Nothing is decided: methods share {len(seeds)} seed{many}, and it takes three to tell a difference."
    )


def test_one_method_alone_is_compared_with_nothing():
    found = analysed(Made({"lora": 0.0}))
    assert found.differences == []
    assert found.summary[0] == (
        "There is nothing to compare: no two methods have a run with the same seed that came to a finite end."
    )


def test_no_run_at_all():
    made = Made({"lora": 0.0, "bone": 0.0})
    made.counting = {"lora": {}, "bone": {}}
    assert analysed(made).summary == ["No run that counts has come to a finite end: there is nothing to say yet."]
    made.sweeps, made.rates = {}, {}
    found = analysed(made)
    assert found.runs == 0
    assert found.method("bone").trainable_parameters is None


def test_ties_are_no_difference():
    made = Made({"lora": 0.0, "bone": 0.0})
    made.counting["bone"] = dict(made.counting["lora"])
    found = analysed(made)
    for difference in found.differences:
        assert (difference.mean, difference.p, difference.verdict) == (0.0, 1.0, NONE_FOUND)
    assert found.between("bone", "lora", "exact-match").mcnemar_p == 1


def test_differences_that_are_the_same_with_every_seed_are_not_judged():
    made = Made({"lora": 0.0, "bone": 0.0}, tests=["rating"], text=False)
    for seed in (1, 2, 3):
        for name, score in (("lora", seed / 7), ("bone", seed / 7 + 0.1)):
            made.change(name, seed, results={"rating": TaskResult("rating", score, None, 1, [])})
    found = analysed(made)
    difference = found.between("bone", "lora", "rating")
    assert (difference.interval, difference.p, difference.verdict) == (None, None, NO_SPREAD)
    assert found.summary[0] == "Nothing is decided: every seed differs by the same, which leaves no spread to judge by."
    assert found.summary[1] == "rating, against `lora`: no spread to judge by, as every seed differs by the same: `bone`."
    assert any("which leaves no spread to judge by" in remark for remark in found.remarks)


def test_differences_that_are_the_same_with_every_seed_stand_on_both_sides_and_are_remarked_once():
    made = Made({"lora": 0.0, "bone": 0.0}, tests=["rating"], text=False)
    for seed in (1, 2, 3):
        for name, score in (("lora", seed / 7), ("bone", seed / 7 + 0.1)):
            made.change(name, seed, results={"rating": TaskResult("rating", score, None, 1, [])})
    found = analysed(made, ("lora", "bone"))
    assert [d.verdict for d in found.differences] == [NO_SPREAD, NO_SPREAD]
    assert sum("no spread" in remark for remark in found.remarks) == 1


def test_the_headline_counts_seeds_where_they_are_too_few():
    made = Made({"lora": 0.0, "bone": 0.2, "bat": 0.2}, (1, 2, 3, 4), tests=["loss"], text=False).diverge("bone", 4)
    for seed in (2, 3, 4):
        del made.counting["bat"][seed]
    found = analysed(made, seeds=(1, 2, 3, 4))
    assert [(d.verdict, len(d.by_seed)) for d in found.differences] == [(BROKEN, 3), (TOO_FEW, 1)]
    assert found.summary[0] == (
        "Nothing is decided: in 1 comparison, methods share 1 seed, and it takes three to tell a difference; in 1 comparison, "
        "a run of one of the methods diverged."
    )
    made = Made({"lora": 0.0, "bone": 0.2, "bat": 0.2}, (1, 2), tests=["loss"], text=False)
    del made.counting["bat"][2]
    assert analysed(made, seeds=(1, 2)).summary[0].startswith("Nothing is decided: methods share at most 2 seeds, and it takes")


def test_scores_that_no_items_make_are_compared_by_seed_alone():
    found = analysed(Made({"lora": 0.0, "bone": 1.0}, tests=["rating"], noise=0.05))
    difference = found.between("bone", "lora", "rating")
    assert found.test("rating").kind == "number"
    assert difference.verdict == BETTER
    assert (difference.bootstrap, difference.only_method) == (None, None)


def test_a_classifiers_score_that_is_no_share_is_none():
    """Matthews' correlation stands beside records that are right or wrong."""
    made = Made({"lora": 0.0, "bone": 0.05}, tests=["exact-match"], text=False)
    for name in made.effects:
        for seed in (1, 2, 3):
            result = made.counting[name][seed].results["exact-match"]
            made.change(name, seed, results={"cola": replace(result, task="cola", score=result.score / 2)})
    found = analysed(made)
    assert found.test("cola").kind == "number"
    assert found.between("bone", "lora", "cola").mcnemar_p is None
    assert analysed(Made({"lora": 0.0}, tests=["exact-match"])).test("exact-match").kind == "share"


def test_other_items_are_not_paired():
    made = Made({"lora": 0.0, "bone": 0.05}, tests=["loss"])
    result = made.counting["bone"][2].results["loss"]
    records = [record | {"row": record["row"] + 1} for record in result.records]
    found = analysed(made.change("bone", 2, results={"loss": replace(result, records=records)}))
    assert found.between("bone", "lora", "loss").bootstrap is None
    assert found.between("bone", "lora", "loss").interval is not None
    assert any("on the same items with seed 2" in remark for remark in found.remarks)


@pytest.mark.parametrize("field", ["expected", "prompt"])
def test_rows_with_other_contents_are_other_items(field):
    made = Made({"lora": 0.0, "bone": 0.05}, tests=["exact-match"], text=False)
    for name in made.effects:
        for seed in (1, 2, 3):
            result = made.counting[name][seed].results["exact-match"]
            told = name if seed == 2 else "the same"
            records = [record | {field: f"{told} {record['row']}"} for record in result.records]
            made.change(name, seed, results={"exact-match": replace(result, records=records)})
    found = analysed(made)
    assert found.between("bone", "lora", "exact-match").bootstrap is None
    assert any("on the same items with seed 2:" in remark for remark in found.remarks)


def test_records_that_do_not_tell_what_the_item_is_are_told_apart_by_their_rows():
    made = Made({"lora": 0.0, "bone": 0.05}, tests=["exact-match"], text=False)
    result = made.counting["bone"][2].results["exact-match"]
    records = [record | {"prompt": "p", "expected": "x"} for record in result.records]
    made.change("bone", 2, results={"exact-match": replace(result, records=records)})
    assert analysed(made).between("bone", "lora", "exact-match").bootstrap is not None


def test_the_sweep_and_its_edge():
    made = Made({"lora": 0.0, "bone": 0.0, "miss": 0.0, "full": 0.0})
    made.rates |= {"bone": 4e-3}
    made.sweeps["miss"] = {}
    made.sweeps["full"] = {}
    rate = made.sweeps["lora"][4e-3]
    made.sweeps["lora"][4e-3] = replace(rate, validation=None, failure="The loss of step 3 is inf")
    found = analysed(made, rate_of={"miss": "bone"})
    inside = {method.name: method.inside for method in found.methods}
    assert inside == {"lora": True, "bone": False, "miss": None, "full": None}
    assert "The best rate of `bone`, 4e-3, lies at the edge of its grid: a better one may lie beyond." in found.remarks
    assert "`lora` diverged at 4e-3, seed 0: The loss of step 3 is inf." in found.remarks
    assert "The rate of `full`, 2e-3, was given and not swept." in found.remarks
    assert not any("The rate of `miss`" in remark for remark in found.remarks)


def test_parameters_that_do_not_match_are_remarked():
    made = Made({"lora": 0.0, "bone": 0.0, "mini": 0.0, "full": 0.0})
    for name, count in {"lora": 1040, "mini": 100, "full": 50_000}.items():
        for seed in (1, 2, 3):
            made.change(name, seed, trainable_parameters=count)
    remarks = analysed(made, matched_to="bone").remarks
    assert "`mini` trains 100 parameters, 90.0% fewer than the 1,000 of `bone`." in remarks
    assert "`full` trains 50,000 parameters, 50.0 times the 1,000 of `bone`." in remarks
    assert not any("`lora` trains" in remark for remark in remarks)


def test_environments_that_differ_are_remarked():
    made = Made({"lora": 0.0, "bone": 0.0})
    found = analysed(made)
    assert found.environment.shared["torch"] == "2.13.0+cpu"
    assert found.environment.varying == {}
    made.change("bone", 1, environment=ENVIRONMENT | {"commit": "def5678"})
    found = analysed(made)
    assert found.environment.varying == {"commit": {"abc1234": 11, "def5678": 1}}
    assert "Not all runs have the same commit: abc1234 (11 runs), def5678 (1 run)." in found.remarks


def test_the_learning_forgetting_curve_is_the_mean_over_seeds():
    made = Made({"lora": 0.0, "bone": 0.05}, scales=(0, 0.5, 1))
    kept = analysed(made).method("bone").kept
    assert [one.scale for one in kept] == [0, 0.5, 1]
    runs = made.counting["bone"].values()
    assert kept[2].score.mean == pytest.approx(np.mean([run.results["loss"].score for run in runs]))
    assert kept[2].forgetting.mean == pytest.approx(np.mean([run.forgetting for run in runs]))
    assert kept[0].forgetting.mean == 0


def test_costs_are_medians_and_the_most():
    made = Made({"lora": 0.0, "bone": 0.0})
    method = analysed(made).method("bone")
    steps = [run.step_seconds for run in made.counting["bone"].values()]
    assert (method.step_seconds.median, method.step_seconds.low) == (np.median(steps), min(steps))
    assert method.peak_memory_bytes == max(run.peak_memory_bytes for run in made.counting["bone"].values())
    assert any(sentence.startswith("Cost: the median step of `lora` takes") for sentence in analysed(made).summary)


def test_what_it_finds_is_json_and_the_same_each_time():
    made = Made({"lora": 0.0, "bone": 0.05}, scales=(0, 1)).diverge("bone", 2)
    texts = {json.dumps(analysed(made).to_json(), allow_nan=False) for _ in range(2)}
    assert len(texts) == 1
