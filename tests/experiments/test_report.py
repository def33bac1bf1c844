import csv
import json
import re

import numpy as np
import pages
import pytest
from made_up_runs import Made, question

from bonetune.evaluation.result import TaskResult
from bonetune.experiments.analysis import analyse
from bonetune.experiments.curves import band
from bonetune.experiments.figures import axis, spread
from bonetune.experiments.report import write_report
from bonetune.experiments.tables import markdown
from bonetune.training.plots import running_mean

EFFECTS = {"bone": 0.1, "lora": 0.0, "bat": 0.02}


class Page(pages.Page):
    def of(self, tag):
        return [text.strip() for text in super().of(tag)]


def written(folder, made, references=("lora", "bone"), seeds=(1, 2, 3), **more):
    asked = question(made.effects, [name for name in references if name in made.effects], seeds, **more)
    found = write_report(folder, asked, made.sweeps, made.rates, made.counting, made.curves())
    return found, Page((folder / "report.html").read_text(encoding="utf-8"))


def test_the_page_has_its_sections_and_every_method_in_each_table(tmp_path):
    asked = {"description": "What it is.", "facts": [("model", "SmolLM2")], "command": "bonetune compare it.yaml"}
    found, page = written(tmp_path, Made(EFFECTS, scales=(0, 0.5, 1)), **asked)
    assert page.of("h2") == [
        "Summary",
        "What was learned",
        "Differences to lora",
        "Differences to bone",
        "Learning and forgetting",
        "Training",
        "Choosing the learning rate",
        "Costs",
        "How to read this",
        "Settings",
        "Environment",
    ]
    for table in page.of("table"):
        if table.startswith(("method", "validation")):
            assert sum(name in table for name in EFFECTS) >= 2
    titles = page.of("h3")
    assert {"Training loss", "Against tokens trained on", "Against time", "Gradient norm"} <= set(titles)
    text = " ".join(page.of("main"))
    for sentence in (*found.summary, *found.remarks):
        assert sentence.replace("`", "") in text
    difference = found.between("bone", "lora", "exact-match")
    assert f"{100 * difference.mean:+.1f}" in text
    assert f"{difference.only_method} : {difference.only_reference}" in text


def test_it_needs_nothing_but_itself(tmp_path):
    _, page = written(tmp_path, Made(EFFECTS), description="<img src=https://example.org/x.png>")
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "link", "img", "iframe", "object", "form", "a", "use"})
    attributes = {name for _, its in page.elements for name in its}
    assert attributes.isdisjoint({"src", "href", "srcset", "action", "xlink:href"})
    assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in "".join(page.of("style"))
    assert "@import" not in "".join(page.of("style"))
    policy = [its["content"] for tag, its in page.elements if tag == "meta" and "http-equiv" in its]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_hostile_names_stay_names(tmp_path):
    hostile = ["<b>a</b>", '"&{{ 7 * 7 }}', "</style><script>alert(1)</script>", "a|b`c"]
    made = Made({**dict.fromkeys(hostile, 0.0), "lora": 0.0}, scales=(0, 1)).diverge(hostile[0], 1, why="</main> is nan")
    _, page = written(tmp_path, made, references=(hostile[1], "lora"))
    assert "script" not in {tag for tag, _ in page.elements}
    for name in hostile:
        assert name in page.of("th")
    assert "a\\|b'c" in (tmp_path / "results.md").read_text()


@pytest.mark.parametrize(
    "change",
    [
        {"seeds": (1,)},
        {"seeds": (1, 2)},
        {"text": False},
        {"text": False, "scales": (0, 1)},
        {"tests": ["exact-match"], "scales": (0, 0.5, 1)},
        {"tests": ["rating"]},
        {"tests": [], "scales": ()},
        {"items": 1},
        {"noise": 0.0},
    ],
)
def test_reports_of_little(tmp_path, change):
    made = Made(EFFECTS, **change)
    _, page = written(tmp_path, made, seeds=change.get("seeds", (1, 2, 3)))
    assert "nan" not in " ".join(page.of("main")).lower().replace("finance", "")


def test_one_method_alone(tmp_path):
    _, page = written(tmp_path, Made({"lora": 0.0}, scales=(0, 1)))
    assert not any(title.startswith("Differences") for title in page.of("h2"))


def test_nothing_has_run(tmp_path):
    made = Made(EFFECTS)
    made.sweeps, made.rates, made.counting = {}, {}, {}
    found, page = written(tmp_path, made)
    assert found.summary[0] in page.of("p")


def test_runs_that_diverged_are_seen(tmp_path):
    made = Made(EFFECTS, scales=(0, 1)).diverge("bat", 1).diverge("bat", 2).diverge("bat", 3)
    _, page = written(tmp_path, made)
    assert "diverged" in page.of("td")
    assert [text for text in page.of("span") if text == "\N{MULTIPLICATION SIGN}"]
    assert "Remarks" in page.of("h2")


def test_differences_without_spread_are_told_in_the_page_and_the_markdown(tmp_path):
    made = Made({"bone": 0.0, "lora": 0.0}, tests=["rating"], text=False)
    for seed in (1, 2, 3):
        for name, score in (("lora", seed / 7), ("bone", seed / 7 + 0.1)):
            made.change(name, seed, results={"rating": TaskResult("rating", score, None, 1, [])})
    _, page = written(tmp_path, made, ["lora"])
    assert "no spread to judge by" in page.of("td")
    assert {"class": "open"} in [its for tag, its in page.elements if tag == "td"]
    assert "| no spread to judge by |" in (tmp_path / "results.md").read_text()
    for text in (" ".join(page.of("main")), (tmp_path / "results.md").read_text()):
        assert "bone" in text.partition("no spread to judge by, as every seed differs by the same: ")[2]
        assert "where every seed differs by the same, and not by 0, there is no spread to judge by." in text


def test_the_same_runs_make_the_same_files(tmp_path):
    for name in ("a", "b"):
        written(tmp_path / name, Made(EFFECTS, scales=(0, 1)).diverge("bat", 2))
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert files == ["curves.csv", "items.csv", "report.html", "results.json", "results.md", "runs.csv"]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def rows(file):
    with file.open(newline="") as content:
        return list(csv.DictReader(content))


def test_the_tables_hold_what_the_runs_do(tmp_path):
    made = Made(EFFECTS).diverge("bat", 2)
    found, _ = written(tmp_path, made)
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(found.to_json()))
    runs = rows(tmp_path / "runs.csv")
    assert len(runs) == len(made.outcomes)
    for outcome in made.outcomes:
        trial = outcome.trial
        key = (trial.method, str(trial.learning_rate), str(trial.seed), str(int(trial.seed > 0)))
        (run,) = [r for r in runs if (r["method"], r["learning_rate"], r["seed"], r["counts"]) == key]
        assert run["failure"] == (outcome.failure or "")
        for test, result in outcome.results.items():
            assert float(run[test]) == result.score
    curves = rows(tmp_path / "curves.csv")
    own = [float(row["loss"]) for row in curves if (row["method"], row["seed"]) == ("bone", "3")]
    assert own == [line["loss"] for line in made.curves()["bone"][3]]
    items = rows(tmp_path / "items.csv")
    own = [r for r in items if (r["method"], r["seed"], r["test"]) == ("lora", "1", "loss")]
    mean = np.average([float(r["value"]) for r in own], weights=[float(r["weight"]) for r in own])
    assert mean == pytest.approx(made.counting["lora"][1].results["loss"].score)
    assert {r["value"] for r in items if r["test"] == "exact-match"} == {"0", "1"}


def test_the_markdown_has_tables_of_even_width():
    made = Made(EFFECTS)
    text = markdown(analyse(question(EFFECTS, ("lora",)), made.sweeps, made.rates, made.counting))
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        assert len({len(line) for line in block.splitlines()}) == 1
        assert len({line.count("|") for line in block.splitlines()}) == 1
    assert "## Differences to `lora`" in text
    assert "**0." in text


def logged(values, seconds=1.0):
    return [{"step": n, "seconds": n * seconds, "loss": value} for n, value in enumerate(values, 1)]


def test_a_band_is_the_mean_and_the_range_of_the_seeds_running_means():
    rng = np.random.default_rng(0)
    curves = [logged(rng.normal(size=40).tolist()) for _ in range(3)]
    found = band(dict(enumerate(curves)), "loss", "step")
    smooth = np.array([[v for _, v in running_mean([(x["step"], x["loss"]) for x in c], found.window)] for c in curves])
    assert found.window == 5
    assert found.mean == pytest.approx(smooth.mean(0))
    assert found.low == pytest.approx(smooth.min(0))
    assert found.high == pytest.approx(smooth.max(0))


def test_each_seed_has_its_own_clock():
    slow, fast = logged([3.0, 2.0, 1.0], seconds=2.0), logged([3.0, 2.0, 1.0], seconds=1.0)
    found = band({1: slow, 2: fast}, "loss", "seconds")
    assert (found.places[0], found.places[-1]) == (2.0, 3.0)
    assert found.high == pytest.approx([3.0, 2.5])
    assert found.low == pytest.approx([2.0, 1.0])


def test_a_run_that_diverged_is_not_in_the_band_and_does_not_shorten_it():
    """Training logs no step whose loss is not finite: its curve just ends."""
    found = band({1: logged([3.0, 2.0, 1.0]), 2: logged([3.0])}, "loss", "step", diverged=[2])
    assert found.mean == [3.0, 2.0, 1.0]
    assert found.broken == [[(1.0, 3.0)]]
    assert band({1: logged([3.0])}, "loss", "step", diverged=[1]).places == []
    assert band({1: [], 2: [{"step": 1}]}, "loss", "step") is None


def test_many_places_are_thinned_to_the_ends():
    found = band({1: logged([1.0] * 5000)}, "loss", "step")
    assert len(found.places) <= 240
    assert (found.places[0], found.places[-1]) == (1, 5000)


@pytest.mark.parametrize("values", [[1.0], [0.0], [-3.0, 2.0], [1e-5, 3e-2], [0.0, 1e9], [5.0, 5.0], [1e-300, 1e300]])
def test_an_axis_holds_its_values_and_some_ticks(values):
    made = axis("", values)
    assert all(-1e-6 <= made.place(value) <= 1000 + 1e-6 for value in values)
    assert 1 <= len(made.ticks) <= 13
    assert all(-1e-3 <= tick.place <= 1000 + 1e-3 for tick in made.ticks)


def test_names_stand_apart_and_near():
    assert spread([0, 100, 200], 50) == [0, 100, 200]
    assert spread([100, 100], 50) == [75, 125]
    assert spread([], 50) == []
