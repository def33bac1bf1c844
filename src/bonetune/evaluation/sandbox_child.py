"""What runs in the process of `bonetune.evaluation.sandbox`: it gives up what it may do, and then runs the program.

A script of the standard library alone, started by its path; `sandbox` says what each layer is for.
"""

import ctypes
import json
import math
import os
import resource
import signal
import struct
import sys
import types
from collections.abc import Iterator
from typing import Any, NoReturn

# The layers' names, as `sandbox.layers` tells them.
PRIVILEGES, LANDLOCK, SECCOMP = "privileges", "Landlock", "seccomp"
DETAIL = 300  # characters of an error
REPORT_BYTES = 4096
OPEN_FILES = 64

# System calls a program may make, by their numbers on x86_64 and aarch64: they read, compute, wait, or end the program itself.
ALLOWED: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67), "pwrite64": (18, 68),
    "close": (3, 57), "close_range": (436, 436), "lseek": (8, 62), "fstat": (5, 80), "stat": (4, None), "lstat": (6, None),
    "newfstatat": (262, 79), "statx": (332, 291), "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439),
    "readlink": (89, None), "readlinkat": (267, 78), "getdents": (78, None), "getdents64": (217, 61), "getcwd": (79, 17),
    "chdir": (80, 49), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "pipe": (22, None), "pipe2": (293, 59),
    "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72),
    "mmap": (9, 222), "munmap": (11, 215), "mprotect": (10, 226), "mremap": (25, 216), "madvise": (28, 233), "brk": (12, 214),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133), "sigaltstack": (131, 132),
    "futex": (202, 98), "set_robust_list": (273, 99), "get_robust_list": (274, 100), "rseq": (334, 293),
    "membarrier": (324, 283), "gettid": (186, 178), "sched_yield": (24, 124), "sched_getaffinity": (204, 123),
    "getcpu": (309, 168), "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153), "getrusage": (98, 165),
    "getitimer": (36, 102), "setitimer": (38, 103), "alarm": (37, None), "pause": (34, None), "restart_syscall": (219, 128),
    "getpid": (39, 172), "getppid": (110, 173), "getpgrp": (111, None), "getpgid": (121, 155), "getsid": (124, 156),
    "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177), "getgroups": (115, 158),
    "getresuid": (118, 148), "getresgid": (120, 150), "getrlimit": (97, 163), "uname": (63, 160), "sysinfo": (99, 179),
    "umask": (95, 166), "getrandom": (318, 278), "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip
# Those it may make with some arguments only; `_conditions` says which.
CONDITIONAL: dict[str, tuple[int | None, int | None]] = {
    "open": (2, None), "openat": (257, 56), "clone": (56, 220), "clone3": (435, 435), "kill": (62, 129), "tgkill": (234, 131),
    "prlimit64": (302, 261), "ioctl": (16, 29), "fcntl": (72, 25), "prctl": (157, 167),
}  # fmt: skip
# What a kernel calls its machine: the column above, and seccomp's name for it.
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

_PR_SET_PDEATHSIG, _PR_SET_NAME, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 15, 22, 38
_LOAD, _AND, _EQUAL, _RETURN = 0x20, 0x54, 0x15, 0x06  # instructions of the filter
_ALLOW, _ERROR, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_EPERM, _ENOSYS = 1, 38

Instruction = tuple[int, int, int, int]  # code, how many to skip if equal, if not, a constant


class Unavailable(Exception):  # noqa: N818  (it says what the system lacks)
    """A layer that this system does not have."""


def limit(which: int, most: int, warned: int = 0) -> None:
    """Lower a limit of this process, for good; `warned`: so much earlier there is the limit's own signal."""
    _, hard = resource.getrlimit(which)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(which, (max(0, most - warned), most))


def give_up_privileges() -> None:
    """Drop every capability, root's too, and let no program that is started bring one back.

    Raises `Unavailable` if the kernel refuses.
    """
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if _libc().capset(struct.pack("Ii", 0x20080522, 0), bytes(24)):
        raise Unavailable(f"privileges cannot be given up: {_error()}")


def restrict_files(folders: list[str]) -> bool:
    """By Landlock, let files be opened beneath `folders` only, and for reading only; whether the kernel can do that."""
    version = _syscall(444, None, 0, 1)
    if version < 1:
        return False
    rights = 0x1FFF if version < 2 else 0x3FFF if version < 3 else 0x7FFF if version < 5 else 0xFFFF
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = _syscall(444, struct.pack("QQQ", rights, 0b11, 0b11), size, 0)  # files; TCP; sockets and signals to others
    if ruleset < 0:
        return False
    for folder in folders:
        try:
            place = os.open(folder, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        read = 0b1100 if os.path.isdir(folder) else 0b0100  # READ_DIR, READ_FILE
        _syscall(445, ruleset, 1, struct.pack("=Qi", read, place), 0)
        os.close(place)
    done = _syscall(446, ruleset, 0) == 0
    os.close(ruleset)
    return done


def restrict_calls() -> None:
    """By seccomp, let this process make the calls of `ALLOWED` and `CONDITIONAL` only; others fail with EPERM.

    Raises `Unavailable` if the kernel has no seccomp, or its calls' numbers are not known here.
    """
    machine = os.uname().machine
    if machine not in MACHINES or struct.calcsize("P") != 8:
        raise Unavailable(f"the system calls of {machine} are not known, only those of {' and '.join(MACHINES)} in 64 bits")
    column, name = MACHINES[machine]
    code: list[Instruction] = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, name), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    rules = {call: [(_RETURN, 0, 0, _ALLOW)] for call in ALLOWED} | _conditions()
    for call, rule in rules.items():
        number = (ALLOWED | CONDITIONAL)[call][column]
        if number is not None:
            code += [(_EQUAL, 0, len(rule), number), *rule]
    code.append(_refuse())
    instructions = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in code))
    _prctl(_PR_SET_SECCOMP, 2, struct.pack("HP", len(code), ctypes.addressof(instructions)))


def _conditions() -> dict[str, list[Instruction]]:
    # a thread of this process: CLONE_VM, CLONE_SIGHAND, CLONE_THREAD; no new namespace, nothing traced
    thread, other = 0x10900, 0x7E022000
    reading = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC
    own = os.getpid()
    return {
        "open": _if_bits(1, reading, 0),
        "openat": _if_bits(2, reading, 0),
        "clone": _if_bits(0, thread | other, thread),
        "clone3": [_refuse(_ENOSYS)],  # its flags lie in memory, out of sight; libraries fall back to clone
        "kill": _if_among(0, own),
        "tgkill": _if_among(0, own),
        # a limit is read, not set: the third argument is a null pointer, both halves of it
        "prlimit64": [(_LOAD, 0, 0, _place(2) + 4), (_EQUAL, 1, 0, 0), _refuse(), *_if_among(2, 0)],
        "ioctl": _if_among(1, 0x5401, 0x5413, 0x541B, 0x5450, 0x5451),  # TCGETS, TIOCGWINSZ, FIONREAD, FIONCLEX, FIOCLEX
        "fcntl": _if_among(1, 0, 1, 2, 3, 1030),  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC
        "prctl": _if_among(0, _PR_SET_NAME),
    }


def _place(argument: int) -> int:
    """Where the lower half of a call's argument lies, in bytes."""
    return 16 + 8 * argument


def _if_bits(argument: int, mask: int, value: int) -> list[Instruction]:
    return [(_LOAD, 0, 0, _place(argument)), (_AND, 0, 0, mask), (_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ALLOW), _refuse()]


def _if_among(argument: int, *values: int) -> list[Instruction]:
    rule: list[Instruction] = [(_LOAD, 0, 0, _place(argument))]
    for value in values:
        rule += [(_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ALLOW)]
    return [*rule, _refuse()]


def _refuse(error: int = _EPERM) -> Instruction:
    return _RETURN, 0, 0, _ERROR | error


def readable() -> list[str]:
    """The folders and files that a bare Python may want to read."""
    own = [os.path.dirname(os.__file__), f"{sys.base_prefix}/lib", f"{sys.base_exec_prefix}/lib"]
    return [*own, "/usr", "/lib", "/lib64", "/nix/store", "/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/urandom"]


def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _error() -> str:
    return os.strerror(ctypes.get_errno())


def _words(arguments: tuple[Any, ...]) -> list[Any]:
    """Arguments as wide as registers."""
    return [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]


def _syscall(number: int, *arguments: Any) -> int:
    return _libc().syscall(ctypes.c_long(number), *_words(arguments))


def _prctl(option: int, *arguments: Any) -> None:
    if _libc().prctl(option, *_words((*arguments, 0, 0, 0, 0)[:4])):
        raise Unavailable(f"prctl({option}) fails: {_error()}")


def confine(parent: int) -> Iterator[str]:
    """All layers but the limits, from the outermost to the one that lets none be changed; each is named once it is in force.

    Args:
        parent: the process that waits for this one, which is not to outlive it.

    Raises:
        Unavailable: a layer is missing without which nothing untrusted should run.
    """
    if sys.platform != "linux":
        raise Unavailable(f"{sys.platform} has no seccomp")
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    give_up_privileges()
    yield PRIVILEGES
    if restrict_files(readable()):
        yield LANDLOCK
    restrict_calls()
    yield SECCOMP
    try:
        with open(os.__file__, "rb"):
            pass
    except OSError as error:
        raise Unavailable(f"without privileges, Python cannot read its library ({error})") from error


def run(source: str, token: str, report: int) -> NoReturn:
    """Run a program as a module named `program`, report how it ended to a file, and leave.

    Args:
        source: the program.
        token: what is reported of a program that came to its end; of others, the error.
        report: the file's descriptor.
    """
    write, leave = os.write, os._exit
    module = types.ModuleType("program")
    sys.modules["program"] = module
    try:
        exec(compile(source, "program", "exec", dont_inherit=True), module.__dict__)  # noqa: S102  (that is what it is for)
    except BaseException as error:
        write(report, _told(error).encode(errors="replace"))
        leave(1)
    write(report, token.encode())
    leave(0)


def _told(error: BaseException) -> str:
    """An error's name and the first line of what it says; the program may have made it say anything, or raise another."""
    try:
        text = str(error).strip().split("\n")[0]
    except BaseException:
        text = ""
    return (type(error).__name__ + (f": {text}" if text else ""))[:DETAIL]


def main() -> NoReturn:
    """Read what is asked on the standard input, say on the standard error why it cannot be done, or do it.

    Without a program, it reports the names of the layers in force, a line each.
    """
    request = json.load(sys.stdin.buffer)
    report, nothing = os.dup(1), os.open(os.devnull, os.O_RDWR)
    layers: list[str] = []
    try:
        limit(resource.RLIMIT_CORE, 0)
        limit(resource.RLIMIT_FSIZE, REPORT_BYTES)
        limit(resource.RLIMIT_NOFILE, OPEN_FILES)
        limit(resource.RLIMIT_CPU, math.ceil(request["seconds"]) + 1, 1)  # SIGXCPU tells why; who ignores it is killed
        limit(resource.RLIMIT_AS, request["memory_bytes"])
        for layer in confine(request["parent"]):
            layers.append(layer)  # noqa: PERF402  (those before one that fails are kept)
    except (Unavailable, ValueError, OSError) as error:
        if not request["unsafe"]:
            sys.stderr.write(str(error))
            sys.stderr.flush()
            os._exit(1)
    if request["source"] is None:
        os.write(report, "\n".join(layers).encode())
        os._exit(0)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    sys.stdout.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]  (a text stream)
    sys.argv = ["program"]
    run(request["source"], request["token"], report)


if __name__ == "__main__":
    main()
