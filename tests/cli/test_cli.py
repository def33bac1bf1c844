"""The command line from outside: exit codes, one clear line, JSON where a program reads."""

import json
import subprocess
import sys
import time
from importlib.metadata import version

import pytest
import yaml


@pytest.fixture
def project(tmp_path, model_folder):
    rows = [{"prompt": f"{a} plus two is", "completion": f" {a}"} for a in ("one", "two", "three", "four")] * 2
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model_name_or_path": str(model_folder),
        "dataset_name": str(tmp_path / "rows.jsonl"),
        "output_dir": str(tmp_path / "run"),
        "r": 4,
        "max_steps": 2,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def test_train_eval_merge(project, run):
    result = json.loads(run("train", project / "run.yaml", "variant=bat-row", "max_steps=3", "--json").out)
    assert result["steps"] == 3
    rows = ["--data", project / "rows.jsonl", "--json"]
    scores = json.loads(run("eval", project / "run", "--tasks", "exact-match,loss", *rows).out)
    assert [score["task"] for score in scores] == ["exact-match", "loss"]
    certificate = json.loads(run("merge", project / "run", "--output", project / "merged", "--json").out)
    assert certificate["holds"]
    merged = run("eval", project / "merged", "--tasks", "loss", *rows)
    assert json.loads(merged.out)[0]["score"] == pytest.approx(scores[1]["score"], rel=1e-4)


def test_eval_by_task_resumed(project, run):
    model = yaml.safe_load((project / "run.yaml").read_text())["model_name_or_path"]
    (project / "text.jsonl").write_text('{"text": "the quick brown fox"}\n' * 3)
    data = ["--data", f"loss={project}/rows.jsonl", "--data", f"perplexity={project}/text.jsonl"]
    command = ("eval", model, "--tasks", "loss,perplexity", *data, "--output-dir", project / "scores")
    said = run(*command).out
    assert "loss: mean cross-entropy" in said
    assert "perplexity: plain text in windows of 1024 tokens" in said
    assert "pass --resume or --overwrite" in run(*command, code=2).err
    assert run(*command, "--resume").out == said
    assert [line["task"] for line in json.loads((project / "scores" / "scores.json").read_text())] == ["loss", "perplexity"]


@pytest.fixture
def comparison(project):
    """Two methods, one seed, a rate each: four runs at most."""
    train = yaml.safe_load((project / "run.yaml").read_text())
    del train["output_dir"], train["r"]
    rows = {"tasks": ["loss"], "data": str(project / "rows.jsonl"), "split": "test[:4]"}
    settings = {
        "output_dir": str(project / "out"),
        "train": train,
        "methods": {"bone": {"r": 4, "learning_rates": [1e-3]}, "lora": {"learning_rates": [1e-3, 2e-3], "r": 2}},
        "seeds": [1],
        "most_rates": 2,
        "validation": rows,
        "tests": rows,
    }
    (project / "comparison.yaml").write_text(yaml.safe_dump(settings))
    return project / "comparison.yaml"


def test_compare(comparison, run):
    shown = run("compare", comparison, "--dry-run").out
    assert "lora: lora, r=2, lora_alpha=2: 1,856 trainable parameters; learning rates 0.001, 0.002" in shown
    assert "At least 2 runs to choose the learning rates, and 2 that count." in shown
    assert "2 runs, all of which count" in run("compare", comparison, "methods.lora.learning_rates=[1e-3]", "--dry-run").out
    assert not (comparison.parent / "out").exists()
    done = run("compare", comparison)
    assert "Nothing is decided: methods share 1 seed, and it takes three to tell a difference." in done.out
    assert "[4 of 4] " in done.err
    folder = comparison.parent / "out"
    left = {name: (folder / name).read_bytes() for name in ("report.html", "results.json", "runs.csv", "curves.csv")}
    assert "already holds a comparison" in run("compare", comparison, code=2).err
    again = run("compare", comparison, "--resume", "--json")
    assert json.loads(again.out) == json.loads(left["results.json"])
    assert {name: (folder / name).read_bytes() for name in left} == left


def found_by(folder):
    """What a comparison's numbers say, without what was measured of time and memory."""
    results = json.loads((folder / "results.json").read_text())
    kept = ("name", "described", "r", "trainable_parameters", "learning_rate", "sweep", "inside", "scores", "kept", "failures")
    methods = [{name: method[name] for name in kept} for method in results["methods"]]
    return methods, results["differences"], results["tests"], (folder / "items.csv").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("runs", "seconds"), [(0, 0.2), (0, 1.5), (1, 0.0), (1, 0.7), (2, 0.4), (3, 0.2), (4, 0.5)])
def test_a_comparison_killed_at_any_moment_goes_on_to_the_same_report(comparison, run, runs, seconds):
    """So many runs are done, and the next one is at work, for so long."""
    command = ["compare", comparison, "methods.bone.learning_rates=[1e-3, 2e-3]", "scales=[0, 1]", "train.max_steps=40"]
    run(*command, f"output_dir={comparison.parent}/whole")
    folder = comparison.parent / "out"
    started = subprocess.Popen([sys.executable, "-m", "bonetune_cli", *map(str, command)], stderr=subprocess.DEVNULL)
    while len(list(folder.glob("runs/*/outcome.json"))) < runs or not (folder / "comparison.yaml").is_file():
        time.sleep(0.02)
        assert started.poll() is None
    time.sleep(seconds)
    assert started.poll() is None, "it came to its end before it was killed"
    started.kill()
    started.wait()
    run(*command, "--resume")
    assert found_by(folder) == found_by(comparison.parent / "whole")


def test_tokenize_and_train_on_it(project, run):
    model = yaml.safe_load((project / "run.yaml").read_text())["model_name_or_path"]
    command = ("tokenize", project / "rows.jsonl", project / "ids", "--model", model)
    made = json.loads(run(*command, "--json").out)
    assert made["documents"] == 8
    assert (project / "ids.bin").stat().st_size == 2 * made["tokens"]
    assert "already there" in run(*command, code=2).err
    said = run(*command, "--overwrite", "--eos-token", "<bos>").out
    assert f"ids.bin: 8 documents, {made['tokens']} tokens as uint16" in said
    assert "token ids do not end" in run("train", project / "run.yaml", "--dry-run", f"dataset_name={project}/ids").err
    run("train", project / "run.yaml", f"dataset_name={project}/ids", "eos_token=<bos>")
    (score,) = json.loads(run("eval", project / "run", "--tasks", "loss", "--data", project / "ids.idx", "--json").out)
    assert score["items"] == 8


def test_dry_run_writes_nothing(project, run):
    shown = run("train", project / "run.yaml", "--dry-run").out
    assert "trainable parameters" in shown
    assert "peak learning rate" in shown
    assert not (project / "run").exists()


def test_brackets_in_a_template_are_shown_as_they_are(project, run):
    shown = run("train", project / "run.yaml", "--dry-run", "prompt_template='[INST] {instruction} [/INST]'").out
    assert "prompt_template: '[INST] {instruction} [/INST]'" in shown


@pytest.mark.filterwarnings("ignore:.*LoRA's size.*")
def test_a_run_that_fails_on_its_way_exits_with_1(project, run):
    assert "has fallen apart" in run("train", project / "run.yaml", "learning_rate=1e20", "max_steps=5", code=1).err


def test_overwrite_and_resume(project, run):
    run("train", project / "run.yaml", "save_steps=1")
    assert "already holds a run" in run("train", project / "run.yaml", code=2).err
    run("train", project / "run.yaml", "--overwrite", "save_steps=1")
    run("train", project / "run.yaml", "max_steps=3", "--resume")
    assert len((project / "run" / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.yaml"], "nowhere.yaml cannot be read"),
        (["train", "{project}/run.yaml", "lerning_rate=1"], "Unknown key 'lerning_rate'"),
        (["train", "{project}/run.yaml", "target_modules=[query]"], "The model has Linear layers named"),
        (["train", "{project}/run.yaml", "variant=bat", "r=5"], "would fit them all"),
        (["train", "{project}/run.yaml", "dataset_name={project}/none.jsonl"], "does not exist"),
        (["tokenize", "{project}/none.jsonl", "{project}/out", "--model", "{project}/run"], "does not exist"),
        (["eval", "{project}", "--tasks", "loss", "--data", "{project}/rows.jsonl"], "has no config.json"),
        (["eval", "x", "--tasks", "gsm8k:lax"], "Unknown task 'gsm8k:lax'"),
        (
            ["eval", "x", "--tasks", "loss", "--data", "a", "--data", "loss=b"],
            "--data a is for all tasks, and there is another",
        ),
        (["eval", "x", "--tasks", "loss", "--judge-url", "http://localhost"], "go together"),
        (["compare", "nowhere.yaml"], "nowhere.yaml cannot be read"),
        (["compare", "{project}/run.yaml"], "Missing key 'train'"),
        (["merge", "{project}", "--output", "{project}/out"], "is not an adapter folder"),
        (["demo", "--variant", "batt", "--output-dir", "{project}/demo"], "Unknown variant 'batt'"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(project, run, arguments, message):
    done = run(*(a.replace("{project}", str(project)) for a in arguments), code=2)
    assert message in done.err
    assert "Traceback" not in done.err
    lines = [line for line in done.err.splitlines() if line.startswith("bonetune: ")]
    assert len(lines) == 1
    assert sorted(p.name for p in project.iterdir()) == ["rows.jsonl", "run.yaml"]


def test_env(run):
    facts = json.loads(run("env", "--json").out)
    assert facts["python"] == sys.version.split()[0]
    assert facts["peft"] == version("peft")


def test_the_process_itself_exits_with_2():
    command = [sys.executable, "-c", "from bonetune_cli.main import main; main()", "train", "nowhere.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    *of_libraries, last = done.stderr.strip().splitlines()  # torchao and bitsandbytes log what they lack when they are imported
    assert last == "bonetune: Configuration file nowhere.yaml cannot be read: No such file or directory."
    assert not any("bonetune" in line or "Traceback" in line for line in of_libraries)


VERBS = ["demo", "train", "eval", "compare", "merge", "chat", "tokenize", "estimate", "env"]


@pytest.mark.parametrize("verb", [[], *([verb] for verb in VERBS)])
def test_help_imports_no_torch(verb):
    """What makes `--help` answer at once."""
    code = f"""
import sys
from importlib.metadata import version
from bonetune_cli.main import app
try:
    app({[*verb, "--help"]!r})
except SystemExit as stop:
    assert stop.code == 0
assert not {{"torch", "transformers", "bonetune"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
