"""The tables of hand-made records, cell by cell."""

import json
import math

import pytest
from scipy import stats

from benchmarks import learning_report
from benchmarks.learning import METHODS, STEPS, Run
from benchmarks.learning_report import parameters_sentence, report, step_seconds
from bonetune.errors import InputError
from bonetune.evaluation import Proportion


def row(text, *cells):
    """The cells of the only table row that begins with these."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    (found,) = [row for row in rows if row[: len(cells)] == list(cells)]
    return found


def test_report_of_complete_records(records):
    text = report(records.complete().study(), ["lora", "bone"], dict.fromkeys(METHODS, 0.5))
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


def test_the_controls_tell_how_far_equal_functions_came_apart(records):
    text = report(records.complete().study(), ["lora"])
    (miss,) = [line for line in text.splitlines() if line.startswith("* `miss` and `bone`: ")]
    assert "by up to 0.0500 nats per token (mean +0.0250)" in miss
    assert "by up to 50.0 points (mean -50.0), and 3 of 6 items" in miss
    (exact,) = [line for line in text.splitlines() if line.startswith("* `bat-exact` and `bat`: ")]
    assert "by up to 0.0000 nats per token (mean +0.0000)" in exact
    assert "* `bat-row-exact` and `bat-row`: " in text
    assert text.count("takes the rate of") == 3


def test_parameters_are_compared_with_bone(records):
    records.complete()
    assert parameters_sentence(records.study()) == "All methods have the same number of trainable parameters."
    records.write(Run("bone", 2e-3, 1), items=[(1.0, 10, True)], parameters=1000)
    records.write(Run("bat-free", 2e-3, 1), items=[(1.0, 10, True)], parameters=774)
    for name in METHODS.keys() - {"bone", "bat-free"}:
        records.write(Run(name, 2e-3, 1), items=[(1.0, 10, True)], parameters=1012 if name == "lora" else 1000)
    sentence = parameters_sentence(records.study())
    assert "relative to the 1,000 of `bone`, they range from -22.6% (`bat-free`) to +1.2% (`lora`)." in sentence
    records.remove("bone-*")
    assert parameters_sentence(records.study()) == "Trainable parameters are matched only approximately."


def test_missing_runs_are_named(records):
    records.complete()
    for pattern in ("bat-lr*-seed[23].json", "miss-*-seed1.json", "bat-free-*", "pissa-*", "lora-lr0.004-seed0.json"):
        records.remove(pattern)
    text = report(records.study(), ["lora", "pissa"], {"bone": 1.0})
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


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_diverged_runs_are_shown_as_such(records, lost):
    records.complete()
    records.write(Run("bat", 1e-3, 0), training=[3.0, 2.0, lost], validation=math.nan)
    records.write(Run("bat", 2e-3, 2), training=[3.0, lost], validation=lost, items=[(lost, 10, False), (lost, 30, False)])
    records.write(Run("lora", 2e-3, 2), training=[lost], validation=lost, items=[(lost, 10, False), (lost, 30, False)])
    study = records.study()
    text = report(study, ["bone", "lora"])
    assert row(text, "bat", "diverged", "**0.2500**") == ["bat", "diverged", "**0.2500**", "0.7500"]
    assert row(text, "bat", "1,234,567")[3:] == ["diverged", "1.5000, diverged, 1.5000", str(Proportion(2, 6)), "3 of 3"]
    to_bone, to_lora = [line for line in text.splitlines() if line.startswith("| bat ") and "2: diverged" in line]
    assert row(to_bone, "bat") == ["bat", "diverged", "-", "1: +0.0500, 2: diverged, 3: +0.0000", "-"]
    assert row(to_lora, "bat") == ["bat", "diverged", "-", "1: +0.0000, 2: diverged, 3: +0.0000", "-"]
    assert f"* `bat` diverged at 1e-3, seed 0: 2 of {STEPS} steps have a finite loss.\n" in text
    assert f"* `bat` diverged at 2e-3, seed 2: 1 of {STEPS} steps have a finite loss.\n" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no map of methods to CPU seconds"),
        ("[1.5]", "no map of methods"),
        ('{"bone": "fast"}', "no map of methods"),
        ('{"bone": {}}', "no map of methods"),
        ('{"bone": NaN}', "nan CPU seconds for `bone`"),
        ('{"bone": 0}', r"0\.0 CPU seconds for `bone`"),
    ],
)
def test_step_times_that_are_none_are_named(tmp_path, content, message):
    (tmp_path / "times.json").write_text(content)
    with pytest.raises(InputError, match=rf"times\.json .*{message}"):
        step_seconds(tmp_path / "times.json")


def test_the_command_writes_what_it_prints(records, tmp_path, monkeypatch, capsys):
    records.complete()
    times, markdown, png = (tmp_path / name for name in ("times.json", "out/report.md", "pictures/out.png"))
    times.write_text(json.dumps(dict.fromkeys(METHODS, 1.5) | {"bat": 3.0}))
    options = ["--step-times", str(times), "--markdown", str(markdown), "--plot", str(png)]
    monkeypatch.setattr("sys.argv", ["learning_report", str(records.folder), *options])
    learning_report.main()
    assert capsys.readouterr().out.strip() == markdown.read_text().strip()
    text = markdown.read_text()
    assert f"CPU seconds for {STEPS} steps" in text
    assert row(text, "bat", "1,234,567")[6] == f"{STEPS * 3:.1f}"
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere holds no run"),
        (["runs", "--references", "rola"], "No method is called"),
        (["runs", "--step-times", "runs/bone-lr0.002-seed1.json"], "no map of methods to CPU seconds"),
    ],
)
def test_the_command_names_wrong_input_in_a_line(records, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    records.complete()
    monkeypatch.setattr("sys.argv", ["learning_report", *arguments])
    with pytest.raises(SystemExit) as stopped:
        learning_report.main()
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
