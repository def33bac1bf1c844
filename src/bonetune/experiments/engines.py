"""Where the runs of a comparison are made: each in a process of its own, here or on the machines of a Ray cluster."""

import multiprocessing
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from bonetune.errors import InputError, RunError
from bonetune.experiments.settings import Comparison

# A function and what to call it with, to be made somewhere.
Job = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
Engine = Callable[[Sequence[Job]], Iterator[tuple[int, Any]]]


@contextmanager
def engine(comparison: Comparison) -> Iterator[Engine]:
    """What makes jobs, and yields the number and the result of each as it is done.

    Raises `InputError` if Ray is asked for and not installed; a job's own error ends all.
    """
    with (_ray if comparison.engine == "ray" else _processes)(comparison) as made:
        yield made


@contextmanager
def _processes(comparison: Comparison) -> Iterator[Engine]:
    # a new process for each run: what it holds is its own, and goes with it
    pool = ProcessPoolExecutor(comparison.parallel, _starting(), initializer=_begin, max_tasks_per_child=1)

    def made(jobs: Sequence[Job]) -> Iterator[tuple[int, Any]]:
        running: dict[Future[Any], int] = {pool.submit(f, *args, **kwargs): n for n, (f, args, kwargs) in enumerate(jobs)}
        for future in as_completed(running):
            try:
                yield running[future], future.result()
            except BrokenProcessPool as error:
                raise RunError(
                    "A run's process was ended from outside; with little memory, the system does that. What is done is kept: "
                    "--resume goes on from there."
                ) from error

    try:
        yield made
    finally:
        pool.shutdown(cancel_futures=True)


def _starting() -> Any:
    """How processes are started: forked from one that has imported everything and done nothing, where that can be."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["bonetune.experiments.trial"])
    return server


def _begin() -> None:
    """End this process once the one that started it is gone, however that ended: what goes on would find it at work.

    Libraries' advice, which each process would give anew, is not for the user of a comparison.
    """
    for module in ("transformers", "torch", "peft", "accelerate"):
        warnings.filterwarnings("ignore", module=rf"{module}(\..*)?")
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _there(folder: str, function: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """Call a function on one of Ray's machines, from the folder that relative paths are meant from."""
    try:
        os.chdir(folder)
    except OSError as error:
        raise InputError(f"A machine of the Ray cluster has no {folder}: share the folder, under the same path.") from error
    return function(*arguments, **keywords)


@contextmanager
def _ray(comparison: Comparison) -> Iterator[Engine]:
    try:
        import ray  # pyright: ignore[reportMissingImports]  (an extra)
        from ray.exceptions import RayError, RayTaskError  # pyright: ignore[reportMissingImports]  (the same)
    except ImportError as error:
        raise InputError("engine: ray needs a package that is not installed: pip install 'bonetune[ray]'.") from error
    began = not ray.is_initialized()
    if began:
        ray.init(log_to_driver=False, configure_logging=False, include_dashboard=False)
    # a run holds its process's memory until the process ends
    options: dict[str, Any] = {"max_calls": 1, "max_retries": 0} | {
        name: value for name, value in comparison.resources.items() if name in ("num_cpus", "num_gpus", "memory")
    }
    own = {name: value for name, value in comparison.resources.items() if name not in options}
    if own:
        options["resources"] = own

    def made(jobs: Sequence[Job]) -> Iterator[tuple[int, Any]]:
        waiting = list(enumerate(jobs))
        running: dict[Any, int] = {}
        while waiting or running:
            while waiting and len(running) < comparison.parallel:
                number, (function, arguments, keywords) = waiting.pop(0)
                running[ray.remote(**options)(_there).remote(os.getcwd(), function, arguments, keywords)] = number
            (done,), _ = ray.wait(list(running))
            try:
                result = ray.get(done)
            except RayTaskError as error:
                raise error.as_instanceof_cause() from error
            except RayError as error:
                raise RunError(f"Ray could not make a run: {str(error).strip().splitlines()[0]}") from error
            yield running.pop(done), result

    try:
        yield made
    finally:
        if began:
            ray.shutdown()
