"""Runs programs that a language model wrote, which may do anything: by mistake, or because they were made to.

Each runs in a process of its own, a bare Python (`sandbox_child.py`) that gives up what it may do before it reads the program:

* seccomp: the process may make only the system calls that a program needs which reads, computes and ends. So it cannot write,
  delete, rename or change any file; start a process or a program; have a socket of any kind; send a signal to another process
  or trace it; change a limit or a namespace; or reach larger parts of the kernel. Without this layer nothing runs.
* Landlock, if the kernel has it (5.13 and newer, if not switched off): files outside Python's and the system's libraries
  cannot be read. It forbids writing once more, and from 6.7 on TCP.
* No privileges: all capabilities are dropped, root's too, before that.
* Limits: address space, processor time, open files, 4 KiB in files, no core dumps; and wall-clock time, at the end of which the
  one process there is is killed, as it is when its parent dies. Processor time judges a program, so that what else the machine
  does does not: the wall-clock limit is three times as much and a second, for programs that wait.
* A session of its own without a terminal, an environment of its own, nothing to read on the standard input, and no output kept.

What is not prevented: a defect in the kernel, used through the calls that are left. Where there is no Landlock (see `layers`),
a program can read what the user can, and 300 characters of an error reach the outcome's `detail`. That a file exists, its size
and times can be seen always. Threads are as many as the memory allows. And a program can appear to pass that does not solve its
problem: it shares a process with its tests, as in HumanEval's own harness, so that it can return an object that equals
everything, or find in its memory the token by which its end is reported. Ending early, whatever the status, or writing to every
file, is no pass.
"""

import json
import math
import os
import secrets
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal

from bonetune.errors import InputError
from bonetune.evaluation.sandbox_child import REPORT_BYTES

LEAST_MEMORY = 64 * 2**20

_CHILD = Path(__file__).with_name("sandbox_child.py")


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Args:
        status: `passed`: it came to its end. `failed`: it raised an exception, or left before. `timeout`: it was at it longer
            than it may be. `killed`: it ended by a signal, as it does when the machine's memory or the stack is used up.
        detail: the error in a line, for people; the program may have made it up. Empty if it passed.
    """

    status: Literal["passed", "failed", "timeout", "killed"]
    detail: str = ""


@dataclass(frozen=True)
class _Ended:
    """How the child ended: its status and processor time (None: it was killed at the wall clock's limit), what it reported."""

    status: int
    used: float | None
    reported: bytes


def run_program(source: str, *, seconds: float = 10.0, memory_bytes: int = 2**29, unsafe: bool = False) -> Outcome:
    """Run an untrusted program.

    It is a module named `program`, not `__main__`; it has the standard library, and no file that it may write. Its hashes are
    the same each time.

    Args:
        source: the program.
        seconds: of processor time, all threads together, with the start of its Python, about 0.1. By the wall clock it may take
            `wall_seconds`.
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
    token = secrets.token_hex(16)
    ended = _child({"source": source, "token": token, "seconds": seconds, "memory_bytes": memory_bytes, "unsafe": unsafe})
    if ended.used is None:
        return Outcome("timeout", f"not at its end after {wall_seconds(seconds):g} s")
    # the kernel counts the limit's seconds by the tick, and may say of the time that it is less
    if ended.status == -signal.SIGXCPU or ended.used > seconds:
        return Outcome("timeout", f"not at its end after {seconds:g} s of processor time")
    return _outcome(ended, token)


def wall_seconds(seconds: float) -> float:
    """How long a program with so many seconds of processor time may take by the wall clock."""
    return 3 * seconds + 1


def layers(*, unsafe: bool = False) -> tuple[str, ...]:
    """What holds programs back on this system besides the limits: of "privileges", "Landlock" and "seccomp" those in force.

    Args:
        unsafe: tell it also of a system where `run_program` needs this to run anything.

    Raises:
        InputError: the system has not what holds a program back.
    """
    ended = _child({"source": None, "seconds": 10.0, "memory_bytes": 2**29, "unsafe": unsafe})
    return tuple(ended.reported.decode().split())


def _child(request: dict[str, Any]) -> _Ended:
    """Have the child do what is asked. Raises `InputError` if it cannot."""
    if os.name != "posix":
        raise InputError(f"Programs that a model wrote cannot be run on {sys.platform}: do it on Linux, in a container.")
    with TemporaryFile() as asked, TemporaryFile() as report, TemporaryFile() as refusal:
        asked.write(json.dumps(request | {"parent": os.getpid()}).encode())
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
        used = None
        try:
            used = _processor_time(process, wall_seconds(request["seconds"]))
        finally:
            if used is None and process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
        refusal.seek(0)
        report.seek(0)
        refused, reported = refusal.read(REPORT_BYTES), report.read(REPORT_BYTES)
    if refused:
        raise InputError(
            f"Programs that a model wrote cannot be held back here: {_printable(refused)}. Run them on Linux, in a container, "
            "or pass --unsafe-code (in Python unsafe_code=True, to run_program unsafe=True) where nothing can be harmed."
        )
    return _Ended(status, used, reported)


def _processor_time(process: "subprocess.Popen[bytes]", seconds: float) -> float | None:
    """Wait for a process; the processor time that it took, or None if it has not ended after so many seconds."""
    end, pause = time.monotonic() + seconds, 0.001
    while True:
        # what subprocess waits by does not tell the time
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return usage.ru_utime + usage.ru_stime
        left = end - time.monotonic()
        if left <= 0:
            return None
        time.sleep(min(pause, left))
        pause = min(2 * pause, 0.05)


def _outcome(ended: _Ended, token: str) -> Outcome:
    if ended.status == 0 and ended.reported == token.encode():
        return Outcome("passed")
    if ended.status < 0:
        return Outcome("killed", f"ended by signal {-ended.status}, {signal.strsignal(-ended.status) or 'unknown'}")
    return Outcome("failed", _printable(ended.reported) or f"left with status {ended.status} before its end")


def _printable(said: bytes) -> str:
    """What a program or its Python said, so that it does no harm to a terminal."""
    text = said.decode(errors="replace").strip()
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in text)
