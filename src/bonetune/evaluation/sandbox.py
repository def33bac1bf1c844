"""Runs programs that a language model wrote, which may do anything: by mistake, or because they were made to.

Each runs in a process of its own, a bare Python (`sandbox_child.py`) that gives up what it may do before it reads the program:

* seccomp: the process may make only the system calls that a program needs which reads, computes and ends. So it cannot write,
  delete, rename or change any file; start a process or a program; have a socket of any kind; send a signal to another process
  or trace it; change a limit or a namespace; or reach larger parts of the kernel. Without this layer nothing runs.
* Landlock, if the kernel has it (5.13 and newer, if not switched off): files outside Python's and the system's libraries
  cannot be read. It forbids writing once more, and from 6.7 on TCP.
* No privileges: all capabilities are dropped, root's too, before that.
* Limits: address space, processor time, open files, 4 KiB in files, no core dumps; and wall-clock time, at the end of which the
  one process there is is killed, as it is when its parent dies.
* A session of its own without a terminal, an environment of its own, nothing to read on the standard input, and no output kept.

What is not prevented: a defect in the kernel, used through the calls that are left. Where there is no Landlock, a program can
read what the user can, and 300 characters of an error reach the outcome's `detail`. That a file exists, its size and times can
be seen always. Threads are as many as the memory allows. And a program can appear to pass that does not solve its problem: it
shares a process with its tests, as in HumanEval's own harness, so that it can return an object that equals everything, or find
in its memory the token by which its end is reported. Ending early, whatever the status, or writing to every file, is no pass.
"""

import json
import math
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Literal

from bonetune.errors import InputError
from bonetune.evaluation.sandbox_child import REPORT_BYTES

LEAST_MEMORY = 64 * 2**20

_CHILD = Path(__file__).with_name("sandbox_child.py")


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Args:
        status: `passed`: it came to its end. `failed`: it raised an exception, or left before. `timeout`: it was still at it.
            `killed`: it ended by a signal, as it does when the machine's memory or the stack is used up.
        detail: the error in a line, for people; the program may have made it up. Empty if it passed.
    """

    status: Literal["passed", "failed", "timeout", "killed"]
    detail: str = ""


def run_program(source: str, *, seconds: float = 10.0, memory_bytes: int = 2**29, unsafe: bool = False) -> Outcome:
    """Run an untrusted program.

    It is a module named `program`, not `__main__`; it has the standard library, and no file that it may write. Its hashes are
    the same each time.

    Args:
        source: the program.
        seconds: of wall-clock time, with the start of its Python, about 0.1.
        memory_bytes: of address space, for Python and the program.
        unsafe: run it also where the system has not what holds it back, with the limits alone. It can then do all that the
            user can, and leave processes behind.

    Raises:
        InputError: the system has not what holds a program back, or a limit is out of its range.
    """
    if not math.isfinite(seconds) or seconds <= 0:
        raise InputError(f"seconds should be above 0, got {seconds}.")
    if memory_bytes < LEAST_MEMORY:
        raise InputError(f"memory_bytes should be at least {LEAST_MEMORY}, which Python itself needs, got {memory_bytes}.")
    if os.name != "posix":
        raise InputError(f"Programs that a model wrote cannot be run on {sys.platform}: do it on Linux, in a container.")
    token = secrets.token_hex(16)
    limits = {"seconds": seconds, "memory_bytes": memory_bytes, "unsafe": unsafe}
    request = limits | {"source": source, "token": token, "parent": os.getpid()}
    with TemporaryFile() as asked, TemporaryFile() as report, TemporaryFile() as refusal:
        asked.write(json.dumps(request).encode())
        asked.seek(0)
        process = subprocess.Popen(  # noqa: S603  (this Python and its own script)
            [sys.executable, "-sSPB", "-X", "utf8", str(_CHILD)],
            stdin=asked,
            stdout=report,
            stderr=refusal,
            cwd="/",
            env={"PYTHONHASHSEED": "0"},
            start_new_session=True,
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            return Outcome("timeout", f"not at its end after {seconds:g} s")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        refusal.seek(0)
        report.seek(0)
        refused, reported = refusal.read(REPORT_BYTES), report.read(REPORT_BYTES)
    if refused:
        raise InputError(
            f"Programs that a model wrote cannot be held back here: {_printable(refused)}. Run them on Linux, in a container, "
            "or pass unsafe=True where nothing can be harmed."
        )
    return _outcome(process.returncode, reported, token)


def run_programs(
    sources: Sequence[str],
    *,
    workers: int | None = None,
    seconds: float = 10.0,
    memory_bytes: int = 2**29,
    unsafe: bool = False,
) -> list[Outcome]:
    """`run_program` for each program, so many at a time (None: as there are processors), outcomes in their order."""
    run = partial(run_program, seconds=seconds, memory_bytes=memory_bytes, unsafe=unsafe)
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        return list(pool.map(run, sources))


def _outcome(status: int, reported: bytes, token: str) -> Outcome:
    if status == 0 and reported == token.encode():
        return Outcome("passed")
    if status < 0:
        return Outcome("killed", f"ended by signal {-status}, {signal.strsignal(-status) or 'unknown'}")
    return Outcome("failed", _printable(reported) or f"left with status {status} before its end")


def _printable(said: bytes) -> str:
    """What a program or its Python said, so that it does no harm to a terminal."""
    text = said.decode(errors="replace").strip()
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in text)
