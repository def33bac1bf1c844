import json
import multiprocessing
import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from bonetune.errors import InputError, RunError
from bonetune.experiments.compare import compare
from bonetune.experiments.engines import _there, engine


def answer(number, *, to=None):
    return number, os.getpid(), to


def fail():
    raise InputError("it cannot be")


def die():
    os._exit(9)


def tick(file):
    while True:
        file.write_text(str(time.monotonic()))
        time.sleep(0.05)


def comparison(**changes):
    return SimpleNamespace(**({"engine": "processes", "parallel": 2, "resources": {}} | changes))


def test_each_job_has_a_process_of_its_own():
    with engine(comparison()) as make:
        made = dict(make([(answer, (n,), {"to": "x"}) for n in range(3)]))
    assert {n: (found[0], found[2]) for n, found in made.items()} == {n: (n, "x") for n in range(3)}
    assert len({found[1] for found in made.values()} | {os.getpid()}) == 4


def test_a_jobs_own_error_ends_all():
    with engine(comparison(parallel=1)) as make, pytest.raises(InputError, match="it cannot be"):
        list(make([(fail, (), {}), (answer, (1,), {})]))


def test_a_process_that_is_ended_from_outside():
    with engine(comparison(parallel=1)) as make, pytest.raises(RunError, match="A run's process was ended from outside"):
        list(make([(die, (), {})]))


def orphaned(file):
    """A process that starts a job which never ends, and goes without a word."""

    def leave():
        while not file.exists():
            time.sleep(0.1)
        os._exit(9)

    threading.Thread(target=leave).start()
    with engine(comparison(parallel=1)) as make:
        list(make([(tick, (file,), {})]))


def test_a_job_ends_with_the_process_that_wanted_it(tmp_path):
    file = tmp_path / "ticks"
    parent = multiprocessing.get_context("spawn").Process(target=orphaned, args=(file,))
    parent.start()
    parent.join(60)
    assert parent.exitcode == 9
    time.sleep(1)
    before = file.read_text()
    time.sleep(0.5)
    assert file.read_text() == before


def test_ray_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'bonetune\[ray\]'"), engine(comparison(engine="ray")):
        pass


def test_a_machine_without_the_folder_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert _there(str(tmp_path), Path.cwd, (), {}) == tmp_path
    with pytest.raises(InputError, match="has no /nowhere: share the folder, under the same path"):
        _there("/nowhere", Path.cwd, (), {})


@pytest.mark.slow
def test_a_comparison_on_a_ray_cluster(tmp_path, monkeypatch, model_folder):
    """With paths relative to where it was started, as in the examples."""
    pytest.importorskip("ray", reason="an extra: pip install 'bonetune[ray]'")
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{a} {b}", "completion": f" {a}"} for a in ("one", "two", "three", "four") for b in ("x", "y", "z")]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loss = {"tasks": ["loss"], "data": "rows.jsonl"}
    settings = {
        "output_dir": "out",
        "train": {
            "model_name_or_path": str(model_folder),
            "dataset_name": "rows.jsonl",
            "dataset_split": "train[:8]",
            "max_steps": 2,
        },
        "methods": {"bone": {"r": 8, "learning_rates": [1e-3]}, "lora": {"learning_rates": [1e-3]}},
        "seeds": [1],
        "validation": loss | {"split": "train[8:10]"},
        "tests": loss | {"split": "train[10:]"},
        "engine": "ray",
        "resources": {"num_cpus": 1},
    }
    result = compare(settings)
    assert {method.name: method.seeds for method in result.analysis.methods} == {"bone": [1], "lora": [1]}
    assert len(Path("out/curves.csv").read_text().splitlines()) == 1 + 2 * 2


@pytest.mark.slow
def test_jobs_on_a_ray_cluster(tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="an extra: pip install 'bonetune[ray]'")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    with engine(comparison(engine="ray", resources={"num_cpus": 1})) as make:
        made = dict(make([(answer, (n,), {"to": "x"}) for n in range(3)]))
        assert {n: (found[0], found[2]) for n, found in made.items()} == {n: (n, "x") for n in range(3)}
        with pytest.raises(InputError, match="it cannot be"):
            list(make([(fail, (), {})]))
        with pytest.raises(RunError, match="Ray could not make a run"):
            list(make([(die, (), {})]))
