import json
import math

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pages import Page

from bonetune.errors import InputError
from bonetune.training import make_config
from bonetune.training.report_page import write_report

SETTINGS = {"model_name_or_path": "some/model", "dataset_name": "rows.jsonl", "output_dir": "run", "variant": "bat", "r": 32}
CERTIFICATE = {"prompts": 16, "tokens": 153, "error": 0.01, "size": 2.0, "effect": None, "greedy_agreement": 1.0, "holds": True}


def lines(values):
    return "".join(json.dumps(value) + "\n" for value in values)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run.yaml").write_text(make_config(SETTINGS).to_yaml())
    steps = [{"step": n, "loss": 3.0 / n, "seconds": n * 2.0, "tokens": n * 100} for n in range(1, 21)]
    (tmp_path / "metrics.jsonl").write_text(lines([*steps, {"step": 20, "eval_loss": 0.25, "eval_accuracy": 0.5}]))
    return tmp_path


def page(folder):
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_a_bare_run_has_its_figures_curves_and_settings_and_nothing_else(folder):
    shown = page(folder)
    facts = dict(zip(shown.of("dt"), shown.of("dd"), strict=True))
    assert facts["Base model"] == "some/model"
    assert facts["Adapter"] == "bat, r = 32"
    assert facts["Training loss"] == "3 → 0.15"
    assert facts["Evaluation loss"] == "0.25"
    assert facts["Accuracy"] == "0.5"
    assert facts["Time"] == "40.0 s"
    assert shown.of("h2") == ["Curves over optimizer steps", "Settings"]
    assert shown.of("h3")[:3] == ["Loss, nats a supervised token", "Accuracy", "Tokens a second"]


def test_it_needs_nothing_but_itself(folder):
    (folder / "samples.jsonl").write_text(lines([{"prompt": "<img src=https://example.org/x.png>"}]))
    shown = page(folder)
    assert {tag for tag, _ in shown.elements}.isdisjoint({"script", "link", "img", "iframe", "object", "form", "a"})
    attributes = {name for _, its in shown.elements for name in its}
    assert attributes.isdisjoint({"src", "href", "srcset", "action"})
    assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in "".join(shown.of("style"))
    assert "@import" not in "".join(shown.of("style"))


def test_every_file_has_its_section(folder):
    summary = {"base": "b", "variant": "bone", "r": 8, "trainable_parameters": 1000, "total_parameters": 4000}
    summary |= {"examples": 160, "tokens": 5000, "supervised": 700, "longest": 90, "steps": 20, "seconds": 3700}
    summary |= {"notes": ["mind <this>"]}
    summary |= {"findings": [{"name": "overlap", "severity": "warning", "message": "row 4 & row 5"}]}
    (folder / "summary.json").write_text(json.dumps(summary))
    environment = {"environment": {"torch": "2.13", "trl": None, "gpus": []}, "git": {"commit": "abc", "dirty": True}}
    (folder / "environment.json").write_text(json.dumps(environment | {"command": ["bonetune", "train"]}))
    (folder / "certificate.json").write_text(json.dumps(CERTIFICATE))
    (folder / "samples.jsonl").write_text(lines([{"prompt": "2+2", "expected": "4", "before": "5", "after": " 4\n"}]))
    shown = page(folder)
    assert shown.of("h2") == [
        "What the data checks found",
        "Curves over optimizer steps",
        "Answers before and after training",
        "Certificate of the merge",
        "Settings",
        "Environment",
    ]
    facts = dict(zip(shown.of("dt"), shown.of("dd"), strict=True))
    assert facts["Trainable parameters"] == "1,000 (25.00% of 4,000)"
    assert facts["Time"] == "1 h 1 min"
    assert shown.of("p", "warning note") == ["mind <this>"]
    assert shown.of("li") == ["warning overlap row 4 & row 5"]
    assert [text for text in shown.of("h3") if "as expected" in text] == ["After training as expected"]
    cells = dict(zip(shown.of("th"), shown.of("td"), strict=False))
    assert cells["Tokens compared"] == "153"
    assert "effect" not in " ".join(cells)
    assert shown.of("span", "tag good") == ["as expected", "holds"]
    assert ("git", "abc, with changes that are not committed") in [
        (name, text) for (_, _, name), (_, _, text) in zip(shown.texts, shown.texts[1:], strict=False)
    ]


def test_settings_that_differ_are_shown_apart_and_unknown_ones_are_kept(folder):
    content = yaml.safe_load((folder / "run.yaml").read_text())
    (folder / "run.yaml").write_text(yaml.safe_dump(content | {"rank_pattern": {"q_proj": 8}, "of_old": "x<y"}))
    shown = page(folder)
    names, cells = shown.of("th"), shown.of("td")
    chosen = {*SETTINGS, "rank_pattern", "of_old"}
    assert set(names[: len(chosen)]) == chosen
    assert sorted(names[len(chosen) :]) == sorted([*make_config(SETTINGS).model_dump(), "of_old"])
    rows = {name: cells[2 * number : 2 * number + 2] for number, name in enumerate(names[: len(chosen)])}
    assert rows["r"] == ["32", "default: 64"]
    assert rows["rank_pattern"] == ["{q_proj: 8}", "default: {}"]
    assert rows["of_old"] == ["x<y", ""]


# what parsers of HTML themselves change: ends of lines, NUL and half surrogates
TEXT = st.text(st.characters(exclude_characters="\r\x00", exclude_categories=["Cs"]), max_size=60)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(texts=st.tuples(TEXT, TEXT, TEXT, TEXT))
def test_texts_are_shown_as_they_are(folder, texts):
    sample = dict(zip(("prompt", "before", "after", "expected"), texts, strict=True))
    (folder / "samples.jsonl").write_text(lines([sample]), encoding="utf-8")
    assert page(folder).of("div", "text") == list(texts)


def test_hostile_texts_stay_texts(folder):
    hostile = '</div></style><script>alert("1")</script>{{ 7 * 7 }}'
    (folder / "samples.jsonl").write_text(lines([{"prompt": hostile, "after": "half \ud83d of a pair"}]))
    (folder / "summary.json").write_text(json.dumps({"base": hostile, "findings": [{"message": hostile}]}))
    shown = page(folder)
    assert shown.of("div", "text")[0] == hostile
    assert "script" not in {tag for tag, _ in shown.elements}
    assert hostile in shown.of("dd")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_values_that_are_no_numbers_do_not_break_the_page(folder, value):
    steps = [{"step": n, "loss": value, "grad_norm": value, "learning_rate": value, "memory_bytes": value} for n in (1, 2)]
    (folder / "metrics.jsonl").write_text(
        lines([*steps, {"step": 3, "loss": 2.0, "seconds": 1.0}, {"step": 3, "eval_loss": value}])
    )
    (folder / "certificate.json").write_text(json.dumps(CERTIFICATE | {"error": value, "mean_kl": value}))
    shown = page(folder)
    assert "Loss, nats a supervised token" in shown.of("h3")
    assert "nan" not in " ".join(shown.of("div", "plot"))
    missing = [text for text in shown.of("span", "error") if "not finite" in text]
    assert missing == ([] if value is None else ["3 values are not finite"])
    assert ("not finite" in " ".join(shown.of("td"))) == (value is not None)


def test_a_run_that_has_only_begun(folder):
    (folder / "metrics.jsonl").write_text("")
    assert page(folder).of("h2") == ["Settings"]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("run.yaml", None, "holds no run: it has no run.yaml"),
        ("metrics.jsonl", None, "holds no run: it has no metrics.jsonl"),
        ("run.yaml", "- a", "holds a list, not names with values"),
        ("run.yaml", "a: [", "run.yaml cannot be read"),
        ("metrics.jsonl", '{"loss": 1}\n', "has a line without a step"),
        ("metrics.jsonl", "[1]\n", "a line that does not hold names"),
        ("summary.json", "{", "summary.json cannot be read"),
    ],
)
def test_what_is_no_run_is_one_clear_error(folder, file, text, message):
    (folder / file).unlink(missing_ok=True)
    if text is not None:
        (folder / file).write_text(text)
    with pytest.raises(InputError, match=message):
        write_report(folder)
    assert not (folder / "report.html").exists()
