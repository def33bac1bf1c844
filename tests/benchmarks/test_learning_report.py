"""Hand-made records whose differences are known; statistics against SciPy and against every resample there is."""

import itertools
import json
import math

import numpy as np
import pytest
from scipy import optimize, stats

from benchmarks import learning_report
from benchmarks.learning import METHODS, SEEDS, STEPS, Run
from benchmarks.learning_report import (
    Difference,
    exact_difference,
    loss_difference,
    paired_outcomes,
    plot,
    read_records,
    report,
    running_mean,
    select,
    spread,
    step_seconds,
    t_interval,
    two_level_bootstrap,
)
from bonetune.errors import InputError
from bonetune.evaluation import Proportion

RATES = (1e-3, 2e-3, 4e-3)
SWEEP = dict(zip(RATES, (0.5, 0.25, 0.75), strict=True))


def write(folder, run, *, training=None, validation=0.25, items=None):
    record = {
        "method": run.method,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "parameters": 1_234_567,
        "training_losses": training or [2.0 / (step + 1) for step in range(STEPS)],
        "validation_loss": validation,
        "commit": "abc1234",
        "torch": "2.6.0",
        "seconds": 1.0,
    }
    if items is not None:
        record["test_items"] = [{"loss": loss, "tokens": tokens, "correct": correct} for loss, tokens, correct in items]
    (folder / run.file).write_text(json.dumps(record))


def written(folder, items_of, methods=tuple(METHODS), seeds=SEEDS):
    """Complete records: each method's best rate is 2e-3, `items_of(method, seed)` are its test items."""
    for name in methods:
        if METHODS[name].rates:
            for rate, loss in SWEEP.items():
                write(folder, Run(name, rate, 0), validation=loss)
        for seed in seeds:
            write(folder, Run(name, 2e-3, seed), items=items_of(name, seed))
    return folder


def two_items(method, seed):
    """10 and 30 tokens; bone's first item costs `seed` nats more than the others', its second 3 less and is answered."""
    bone = method == "bone"
    return [(20.0 + seed * bone, 10, True), (40.0 - 3 * bone, 30, bone)]


def study_of(folder):
    return select(read_records(folder))


def row(text, *cells):
    """The cells of the only table row that begins with these."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    (found,) = [row for row in rows if row[: len(cells)] == list(cells)]
    return found


@pytest.mark.parametrize("values", [(0.1, 0.3), (-0.02, 0.01, 0.03), (1.0, 2.0, 4.0, 8.0)])
def test_t_interval_is_that_of_scipys_paired_test(values):
    expected = stats.ttest_rel(np.array(values) + 5, np.full(len(values), 5.0)).confidence_interval(0.95)
    assert t_interval(values) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("values", [(0.1,), (0.2, 0.2, 0.2), (0.1, math.nan, 0.2)])
def test_there_is_no_t_interval_without_spread(values):
    assert t_interval(values) is None


def test_bootstrap_draws_as_an_enumeration_of_all_resamples_does():
    groups = [(np.array([1.0, 5.0]), np.array([1.0, 3.0])), (np.array([-2.0, 0.0, 4.0]), np.array([2.0, 1.0, 1.0]))]

    def ratios(values, weights):  # of each equally likely draw of a group's items
        draws = itertools.product(range(len(values)), repeat=len(values))
        return [sum(values[i] for i in draw) / sum(weights[i] for i in draw) for draw in draws]

    # the two places of a resample are drawn independently, each a group with equal odds, then its items
    place = {}
    for group in groups:
        outcomes = ratios(*group)
        for outcome in outcomes:
            place[outcome] = place.get(outcome, 0) + 1 / (len(groups) * len(outcomes))
    expected = {}
    for (a, p), (b, q) in itertools.product(place.items(), repeat=2):
        expected[round((a + b) / 2, 9)] = expected.get(round((a + b) / 2, 9), 0) + p * q

    drawn, counts = np.unique(np.round(two_level_bootstrap(groups, resamples=40_000), 9), return_counts=True)
    assert sum(expected.values()) == pytest.approx(1)
    assert set(drawn) <= set(expected)
    frequencies = dict(zip(drawn, counts / 40_000, strict=True))
    assert all(abs(frequencies.get(value, 0) - p) < 5 * math.sqrt(p / 40_000) for value, p in expected.items())


def test_bootstrap_is_the_same_each_time():
    groups = [(np.array([1.0, 2.0]), np.ones(2)), (np.array([0.0, 5.0]), np.ones(2))]
    assert np.array_equal(two_level_bootstrap(groups, resamples=50), two_level_bootstrap(groups, resamples=50))


def test_differences_of_known_records(tmp_path):
    runs = study_of(written(tmp_path, two_items)).counting
    loss, exact = (difference(runs["bone"], runs["lora"]) for difference in (loss_difference, exact_difference))
    assert loss.by_seed == pytest.approx({seed: (seed - 3) / 40 for seed in SEEDS})
    assert loss.mean == pytest.approx(-1 / 40)
    assert loss.mean == pytest.approx(np.mean([runs["bone"][seed].test_loss - runs["lora"][seed].test_loss for seed in SEEDS]))
    assert loss.interval == t_interval(list(loss.by_seed.values()))
    assert loss.bootstrap is not None
    assert loss.bootstrap[0] < loss.mean < loss.bootstrap[1]
    assert exact.by_seed == {1: 0.5, 2: 0.5, 3: 0.5}
    assert exact.interval is None
    assert paired_outcomes(runs["bone"], runs["lora"]) == ([True, False] * 3, [True, True] * 3)


def test_only_shared_seeds_are_compared(tmp_path):
    runs = study_of(written(tmp_path, two_items)).counting
    assert loss_difference({1: runs["bone"][1], 2: runs["bone"][2]}, {2: runs["lora"][2], 3: runs["lora"][3]}) == Difference(
        {2: pytest.approx(-1 / 40)}, None
    )


def test_different_items_are_not_paired(tmp_path):
    written(tmp_path, two_items)
    write(tmp_path, Run("bone", 2e-3, 2), items=[(20.0, 11, True), (40.0, 30, True)])
    with pytest.raises(InputError, match=r"bone-lr0.002-seed2.json and lora-lr0.002-seed2.json .* different items"):
        report(study_of(tmp_path), ["lora"])


def test_report_of_complete_records(tmp_path):
    text = report(study_of(written(tmp_path, two_items)), ["lora", "bone"], dict.fromkeys(METHODS, 0.5))
    assert row(text, "lora", "0.5000") == ["lora", "0.5000", "**0.2500**", "0.7500"]
    assert row(text, "bone", "1,234,567") == [
        *("bone", "1,234,567", "2e-3", "1.4750", "1.4500, 1.4750, 1.5000"),
        *(str(Proportion(6, 6)), f"{STEPS / 2:.1f}", "3 of 3"),
    ]
    low, high = stats.ttest_1samp([-0.05, -0.025, 0.0], 0).confidence_interval()
    assert row(text, "bone", "-0.0250")[2:4] == [f"[{low:+.4f}, {high:+.4f}]", "1: -0.0500, 2: -0.0250, 3: +0.0000"]
    exact = row(text, "bone", "+50.0")
    assert exact[2:4] == ["-", "1: +50.0, 2: +50.0, 3: +50.0"]
    assert exact[5:] == ["3 : 0", f"{stats.binomtest(0, 3).pvalue:.2g}"]
    assert row(text, "lora", "+0.0250")[3] == "1: +0.0500, 2: +0.0250, 3: +0.0000"
    assert "lacks" not in text
    assert "diverged at" not in text


def test_the_control_tells_how_far_equal_functions_came_apart(tmp_path):
    text = report(study_of(written(tmp_path, two_items)), ["lora"])
    (sentence,) = [line for line in text.splitlines() if line.startswith("The control for noise")]
    assert "`miss` computes the same function as `bone`" in sentence
    assert "by up to 0.0500 nats per token (mean +0.0250)" in sentence
    assert "by up to 50.0 points (mean -50.0), and 3 of 6 items" in sentence


def test_missing_runs_are_named(tmp_path):
    written(tmp_path, two_items)
    for run in (Run("bat", 2e-3, 2), Run("bat", 2e-3, 3), Run("miss", 2e-3, 1)):
        (tmp_path / run.file).unlink()
    for name in ("bat-free", "pissa"):
        for file in tmp_path.glob(f"{name}-*"):
            file.unlink()
    (tmp_path / Run("lora", 4e-3, 0).file).unlink()
    text = report(study_of(tmp_path), ["lora", "pissa"], {"bone": 1.0})
    for remark in (
        "`bat` lacks seeds 2, 3.",
        "`miss` lacks seed 1.",
        "`pissa` has no sweep.",
        "`pissa` lacks seeds 1, 2, 3.",
        "The sweep of `lora` is not finished: its best rate does not lie inside its grid.",
        "No step time is given for `lora`.",
    ):
        assert f"\n* {remark}\n" in text
    assert row(text, "bat", "1,234,567")[4:] == ["1.5000, -, -", str(Proportion(1, 2)), "-", "1 of 3"]
    assert row(text, "pissa", "-") == ["pissa", *["-"] * 3, "-, -, -", *["-"] * 2, "0 of 3"]
    assert "None: no other method has a run that counts with a seed of `pissa`." in text
    assert "Means over different seeds do not compare" in text


def test_runs_at_another_rate_do_not_count(tmp_path):
    written(tmp_path, two_items)
    write(tmp_path, Run("lora", 1e-3, 1), items=[(1.0, 10, True), (1.0, 30, True)])
    study = study_of(tmp_path)
    assert study.counting["lora"][1].learning_rate == 2e-3
    assert "`lora-lr0.001-seed1.json` does not count: that rate is not the one chosen for `lora`." in study.remarks


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_diverged_runs_are_shown_as_such(tmp_path, lost):
    written(tmp_path, two_items)
    write(tmp_path, Run("bat", 1e-3, 0), training=[3.0, 2.0, lost], validation=math.nan)
    write(tmp_path, Run("bat", 2e-3, 2), training=[3.0, lost], validation=lost, items=[(lost, 10, False), (lost, 30, False)])
    write(tmp_path, Run("lora", 2e-3, 2), training=[lost], validation=lost, items=[(lost, 10, False), (lost, 30, False)])
    study = study_of(tmp_path)
    text = report(study, ["bone", "lora"])
    assert row(text, "bat", "diverged", "**0.2500**") == ["bat", "diverged", "**0.2500**", "0.7500"]
    assert row(text, "bat", "1,234,567")[3:] == ["diverged", "1.5000, diverged, 1.5000", str(Proportion(2, 6)), "3 of 3"]
    to_bone, to_lora = [line for line in text.splitlines() if line.startswith("| bat ") and "2: diverged" in line]
    assert row(to_bone, "bat") == ["bat", "diverged", "-", "1: +0.0500, 2: diverged, 3: +0.0000", "-"]
    assert row(to_lora, "bat") == ["bat", "diverged", "-", "1: +0.0000, 2: diverged, 3: +0.0000", "-"]
    assert f"* `bat` diverged at 1e-3, seed 0: 2 of {STEPS} steps have a finite loss.\n" in text
    assert f"* `bat` diverged at 2e-3, seed 2: 1 of {STEPS} steps have a finite loss.\n" in text
    plot(study, None, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_a_rate_that_diverged_is_never_chosen(tmp_path):
    written(tmp_path, two_items)
    write(tmp_path, Run("lora", 1e-3, 0), training=[math.nan], validation=math.nan)
    assert study_of(tmp_path).rates["lora"] == 2e-3


@pytest.mark.parametrize("content", ["{", "[]", '{"method": "bone"}'])
def test_files_that_are_no_records_are_named(tmp_path, content):
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(InputError, match=r"other\.json is no record of a run"):
        read_records(tmp_path)


def test_records_that_cannot_be_compared_are_named(tmp_path):
    write(tmp_path, Run("bone", 2e-3, 1))
    with pytest.raises(InputError, match=r"seed1\.json has no test items"):
        read_records(tmp_path)
    write(tmp_path, Run("bone", 2e-3, 1), training=[1.0], items=two_items("bone", 1))
    with pytest.raises(InputError, match=rf"seed1\.json has 1 steps, not {STEPS}"):
        read_records(tmp_path)


def test_running_mean_is_a_convolution_once_its_window_is_full():
    losses = list(np.random.default_rng(0).exponential(size=20))
    assert running_mean(losses, 5)[4:] == pytest.approx(np.convolve(losses, np.full(5, 0.2), mode="valid"))
    assert running_mean(losses, 5)[:3] == pytest.approx([losses[0], np.mean(losses[:2]), np.mean(losses[:3])])


def test_spread_is_the_nearest_with_a_gap():
    places = [0.1, 0.11, 0.12, 0.5, 0.52, 0.9]
    constraint = {"type": "ineq", "fun": lambda x: np.diff(x) - 0.05}
    start = 0.05 * np.arange(6)
    expected = optimize.minimize(lambda x: 1e3 * np.sum((x - places) ** 2), start, method="SLSQP", constraints=constraint)
    assert spread(places, 0.05) == pytest.approx(expected.x, abs=1e-5)


def test_the_command_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    runs, times, markdown, png = (tmp_path / name for name in ("runs", "times.json", "out/report.md", "out.png"))
    runs.mkdir()
    written(runs, two_items)
    times.write_text(json.dumps({"step_seconds": 2.0, "step": [{"method": name, "ratio": 1.5} for name in METHODS]}))
    assert step_seconds(times)["bat"] == 3.0
    options = ["--step-times", str(times), "--markdown", str(markdown), "--plot", str(png)]
    monkeypatch.setattr("sys.argv", ["learning_report", str(runs), *options])
    learning_report.main()
    assert capsys.readouterr().out.strip() == markdown.read_text().strip()
    assert f"seconds for {STEPS} steps" in markdown.read_text()
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"), [(["nowhere"], "nowhere holds no run"), (["runs", "--references", "rola"], "No method is called")]
)
def test_the_command_names_wrong_input_in_a_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    written(tmp_path / "runs", two_items)
    monkeypatch.setattr("sys.argv", ["learning_report", *arguments])
    with pytest.raises(SystemExit) as stopped:
        learning_report.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
