import multiprocessing
import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from bonetune.errors import InputError, RunError
from bonetune.experiments.engines import engine


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


@pytest.mark.slow
def test_jobs_on_a_ray_cluster(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    with engine(comparison(engine="ray", resources={"num_cpus": 1})) as make:
        made = dict(make([(answer, (n,), {"to": "x"}) for n in range(3)]))
        assert {n: (found[0], found[2]) for n, found in made.items()} == {n: (n, "x") for n in range(3)}
        with pytest.raises(InputError, match="it cannot be"):
            list(make([(fail, (), {})]))
        with pytest.raises(RunError, match="Ray could not make a run"):
            list(make([(die, (), {})]))
