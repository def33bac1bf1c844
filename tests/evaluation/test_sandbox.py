import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from bonetune.errors import InputError
from bonetune.evaluation import sandbox, sandbox_child
from bonetune.evaluation.sandbox import Outcome, layers, run_program

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs are held back on Linux only")

CHILD = Path(sandbox_child.__file__)
HEADERS = Path("/usr/include")


def alone(code, *arguments):
    """Run code with `child`, the module of the layers, in a bare Python that has given up nothing yet."""
    code = f"import sys; sys.path.insert(0, {str(CHILD.parent)!r}); import sandbox_child as child\n{code}"
    command = [sys.executable, "-S", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def has_landlock():
    return alone("print(child.restrict_files(child.readable()))").stdout.strip() == "True"


def in_the_open(source):
    return subprocess.run([sys.executable, "-S", "-c", source], capture_output=True, timeout=60, check=False)


def told(folder):
    """All there is to see of a folder."""
    places = {}
    for path in sorted(folder.rglob("*")):
        facts = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(facts.st_mode) else None
        places[str(path)] = (facts.st_mode, facts.st_nlink, facts.st_mtime_ns, content)
    return places


def survivors():
    """The sandbox's processes of this process, and those that belong to nobody any more."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, facts = (folder / "cmdline").read_bytes(), (folder / "stat").read_text()
        except OSError:
            continue
        parent = int(facts.rpartition(")")[2].split()[1])
        if CHILD.name.encode() in command and parent in (1, os.getpid()):
            found.append(folder.name)
    return found


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "mine"
    (place / "below").mkdir(parents=True)
    (place / "sentinel").write_text("as it was")
    return place


@pytest.mark.parametrize(
    "source",
    [
        "x = 1",
        "import dataclasses, decimal, fractions, hashlib, heapq, itertools, json, math, random, re, statistics, string, typing",
        "import hashlib; assert hashlib.md5(b'a').hexdigest().startswith('0cc1')",
        "import random, time, datetime; random.random(); time.sleep(0.01); time.localtime(); datetime.datetime.now()",
        "print('x', flush=True); import sys; print('y', file=sys.stderr); sys.stdout.buffer.write(b'\\xff\\xfe')",
        "print('\\udc80')",
        "def f(n): return n and f(n - 1)\nassert f(900) == 0",
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int' = 3\nassert A().x == 3",
        (
            "import threading\nout = []\nthreads = [threading.Thread(target=out.append, args=(i,)) for i in range(8)]\n"
            "[t.start() for t in threads]\n[t.join() for t in threads]\nassert sorted(out) == list(range(8))"
        ),
        (
            "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(4) as pool:\n"
            "    assert list(pool.map(str, range(3))) == ['0', '1', '2']"
        ),
        "import resource; assert resource.getrlimit(resource.RLIMIT_AS)[0] == 2**29",
        "import os; assert os.read(0, 1) == b''",
        "import os, sys; assert not os.isatty(0) and os.getcwd() == '/' and sys.argv == ['program']",
        "import os; assert set(os.environ) <= {'PYTHONHASHSEED', 'LC_CTYPE'}, os.environ",
        "import threading, time; threading.Thread(target=time.sleep, args=(100,)).start()",
        (
            "import signal\nsignal.signal(signal.SIGALRM, lambda *_: 1 / 0)\ntry:\n"
            "    signal.setitimer(signal.ITIMER_REAL, 0.05)\n    while True: pass\nexcept ZeroDivisionError: pass"
        ),
        "if __name__ == '__main__': raise SystemExit(1)",
        "\\\n".join(["x = ", *["1 + "] * 200, "1"]),
        "x = '\u00e9\U0001f600'\r\nassert len(x) == 2\r\n",
        "",
    ],
)
def test_what_an_honest_program_needs_is_there(source):
    assert run_program(source) == Outcome("passed")


@pytest.mark.parametrize(
    ("source", "status", "detail"),
    [
        ("assert 1 == 2, 'no'", "failed", "AssertionError: no"),
        ("raise ValueError('a\\nb')", "failed", "ValueError: a"),
        ("def f(:", "failed", "SyntaxError: invalid syntax"),
        ("\tx = 1\n  y = 2", "failed", "IndentationError"),
        ("x = 1\0", "failed", "null byte"),
        ("x = '\udc80'", "failed", "UnicodeEncodeError"),
        ("x = " + "(" * 5000, "failed", "SyntaxError: too many nested parentheses"),
        ("input()", "failed", "EOFError"),
        ("import numpy", "failed", "ModuleNotFoundError"),
        ("def f(): f()\nf()", "failed", "RecursionError"),
        ("raise RecursionError", "failed", "RecursionError"),
        ("raise SystemExit", "failed", "SystemExit"),
        ("raise KeyboardInterrupt", "failed", "KeyboardInterrupt"),
        ("raise Exception('x' * 10**6)", "failed", "Exception: xxx"),
        ("raise Exception('\x1b[31m\\a')", "failed", "Exception: \N{REPLACEMENT CHARACTER}[31m\N{REPLACEMENT CHARACTER}"),
        ("class E(BaseException):\n    def __str__(self): raise self\nraise E", "failed", "E"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", "killed", "signal 15"),
        ("import os; os.abort()", "killed", "signal 6"),
        ("import ctypes; ctypes.string_at(0)", "killed", "signal 11"),
    ],
)
def test_how_others_end(source, status, detail):
    outcome = run_program(source)
    assert outcome.status == status
    assert detail in outcome.detail
    assert len(outcome.detail) <= sandbox_child.DETAIL


def test_what_does_not_end_is_ended():
    endless = [
        "while True: pass",
        "while True: print('x' * 10**6)",
        "import time; time.sleep(1000)",
        "import signal; signal.pause()",
        "import threading; threading.Lock().acquire(); lock = threading.Lock(); lock.acquire(); lock.acquire()",
        "while True:\n    try: raise SystemExit\n    except BaseException: pass",
        "while True:\n    try: x = bytearray(2**40)\n    except MemoryError: pass",
        "from signal import *\nfor s in {*Signals} - {SIGKILL, SIGSTOP}: signal(s, SIG_IGN)\nwhile True: pass",
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    ]
    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(partial(run_program, seconds=1), endless))
    assert [outcome.status for outcome in outcomes] == ["timeout"] * len(endless)
    assert not survivors()


def test_processor_time_decides_and_not_how_long_it_took():
    """A machine under load makes a program take longer, and not its work more."""
    assert run_program("import time; time.sleep(1.2)", seconds=1) == Outcome("passed")
    busy = "import time\nwhile time.process_time() < {}: pass"
    assert run_program(busy.format(0.3), seconds=1) == Outcome("passed")
    for source, seconds in ((busy.format(9), 1), (busy.format(0.7), 0.5)):
        outcome = run_program(source, seconds=seconds)
        assert outcome == Outcome("timeout", f"not at its end after {seconds:g} s of processor time")
    threads = "import threading\ndef work():\n    while True: pass\nthread = threading.Thread(target=work)\nthread.start()\n"
    assert run_program(f"{threads}thread.join()", seconds=1).detail == "not at its end after 1 s of processor time"


def test_a_program_that_sleeps_ends_at_the_wall_clocks_limit():
    assert run_program("import time; time.sleep(1000)", seconds=0.5) == Outcome("timeout", "not at its end after 2.5 s")


def test_a_kill_that_the_limits_did_not_send_is_no_timeout():
    outcome = run_program("import os; os.kill(os.getpid(), 9)", seconds=1)
    assert outcome == Outcome("killed", "ended by signal 9, Killed")


@pytest.mark.parametrize(
    "source",
    [
        "import sys; sys.exit(0)",
        "import sys; sys.exit()",
        "raise SystemExit(0)",
        "import os; os._exit(0)",
        "import ctypes; ctypes.CDLL(None).exit(0)",
        "import ctypes; ctypes.CDLL(None)._exit(0)",
        "import atexit, os; atexit.register(os._exit, 0); 1 / 0",
        "import threading, os, time; threading.Thread(target=os._exit, args=(0,)).start(); time.sleep(5)",
        "import sys; sys.excepthook = lambda *_: None; 1 / 0",
        "import os, builtins; os._exit = os.write = lambda *_: None; builtins.BaseException = int; 1 / 0",
        (
            "import os, sys\nfor fd in range(64):\n    for said in (b'passed', b'\\n', b'0', b'0' * 32):\n"
            "        try: os.write(fd, said)\n        except OSError: pass\nos._exit(0)"
        ),
        "import os; os.closerange(0, 64); os._exit(0)",
        "import __main__\nfor name, value in vars(__main__).items():\n    if isinstance(value, str): print(value)\n1 / 0",
        (
            "import os\nfor place in range(3, 64):\n    for start in (0, 1):\n"
            "        try: text = os.pread(place, 4096, start)\n"
            "        except OSError: continue\n        os.write(place, text[-40:])\nos._exit(0)"
        ),
    ],
)
def test_an_early_end_is_no_pass(source):
    outcome = run_program(f"{source}\nassert False, 'the tests'")
    assert outcome.status == "failed"


# What a program may do to the folder {0!r} of others: each does it, and ends well, when nothing holds it back.
HARM = {
    "write": "open({0!r} + '/sentinel', 'w').write('x')",
    "append": "open({0!r} + '/sentinel', 'a').write('x')",
    "create": "open({0!r} + '/new', 'x')",
    "read_and_write": "open({0!r} + '/sentinel', 'r+').write('x')",
    "truncate_while_reading": "import os; os.open({0!r} + '/sentinel', os.O_RDONLY | os.O_TRUNC)",
    "truncate": "import os; os.truncate({0!r} + '/sentinel', 1)",
    "unlink": "import os; os.unlink({0!r} + '/sentinel')",
    "unlink_at": "import os; os.unlink('sentinel', dir_fd=os.open({0!r}, os.O_PATH))",
    "rename": "import os; os.rename({0!r} + '/sentinel', {0!r} + '/other')",
    "rmtree": "import shutil; shutil.rmtree({0!r})",
    "rmdir": "import os; os.rmdir({0!r} + '/below')",
    "mkdir": "import os; os.mkdir({0!r} + '/new')",
    "symlink": "import os; os.symlink('/', {0!r} + '/new')",
    "link": "import os; os.link({0!r} + '/sentinel', {0!r} + '/new')",
    "mkfifo": "import os; os.mkfifo({0!r} + '/new')",
    "chmod": "import os; os.chmod({0!r} + '/sentinel', 0o777)",
    "chmod_open": "import os; os.fchmod(os.open({0!r} + '/sentinel', os.O_RDONLY), 0o777)",
    "utime": "import os; os.utime({0!r} + '/sentinel', (1, 1))",
    "huge": "import os; os.posix_fallocate(os.open({0!r} + '/new', os.O_CREAT | os.O_RDWR), 0, 2**20)",
    "sqlite": "import sqlite3; sqlite3.connect({0!r} + '/new').execute('create table t (x)')",
    "unix_socket": "import socket; socket.socket(socket.AF_UNIX).bind({0!r} + '/new')",
    "subprocess": "import subprocess; subprocess.run(['/bin/sh', '-c', 'echo > {0}/new'], check=True)",
    "system": "import os; assert os.system('echo > {0}/new') == 0",
    "exec": "import os; os.execv('/bin/sh', ['sh', '-c', 'echo > {0}/new'])",
    "spawn": "import os; os.waitpid(os.posix_spawn('/bin/sh', ['sh', '-c', 'echo > {0}/new'], {{}}), 0)",
    "fork": "import os\npid = os.fork()\nif not pid:\n    open({0!r} + '/new', 'w')\n    os._exit(0)\nos.waitpid(pid, 0)",
    "openat2": "import ctypes, struct\nhow = struct.pack('QQQ', 0o101, 0o600, 0)\n"
    "assert ctypes.CDLL(None).syscall(437, -100, {0!r}.encode() + b'/new', how, 24) >= 0",
    "daemon": "import os, signal, sys, time\nif os.fork():\n    sys.exit()\nos.setsid()\nif os.fork():\n    os._exit(0)\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(0.3)\nopen({0!r} + '/new', 'w')\nos._exit(0)",
}


@pytest.mark.parametrize("harm", HARM)
def test_nothing_of_others_is_changed(folder, harm):
    source = HARM[harm].format(str(folder))
    before = told(folder)
    outcome = run_program(source)
    assert outcome.status == "failed"
    if harm == "daemon":
        time.sleep(0.6)
    assert told(folder) == before
    assert not survivors()

    in_the_open(source)
    if harm == "daemon":
        time.sleep(0.6)
    assert not folder.exists() or told(folder) != before


@pytest.mark.parametrize("place", [Path.home(), Path("/tmp"), Path("/dev/shm"), Path("/var/tmp"), Path("/")])
def test_there_is_no_place_to_write_to(place):
    name = place / f"bonetune-sandbox-{os.getpid()}"
    assert run_program(f"open({str(name)!r}, 'w')").status == "failed"
    assert not name.exists()


@pytest.mark.parametrize("harm", ["write", "truncate_while_reading", "unlink", "rename", "mkdir", "link", "mkfifo", "truncate"])
@pytest.mark.parametrize("layer", ["child.restrict_calls()", "assert child.restrict_files(child.readable())"])
def test_each_of_two_layers_keeps_a_program_from_writing(folder, layer, harm):
    if "files" in layer and not has_landlock():
        pytest.skip("no Landlock here")
    before = told(folder)
    done = alone(f"child.give_up_privileges()\n{layer}\n{HARM[harm].format(str(folder))}")
    assert "PermissionError" in done.stderr
    assert told(folder) == before


def test_only_the_libraries_can_be_read(tmp_path):
    if not has_landlock():
        pytest.skip("no Landlock here")
    secret = tmp_path / "id_rsa"
    secret.write_text("hunter2")
    for place in (secret, "/etc/passwd", f"/proc/{os.getpid()}/environ", "/proc/self/environ", Path.home() / ".bashrc"):
        outcome = run_program(f"raise Exception(open({str(place)!r}, errors='replace').read())")
        assert outcome.detail.startswith(("PermissionError", "FileNotFoundError")), place
    assert run_program(f"import os; os.listdir({str(tmp_path)!r})").detail.startswith("PermissionError")
    assert in_the_open(f"raise Exception(open({str(secret)!r}).read())").stderr.strip().endswith(b"hunter2")


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_there_is_no_network(kind):
    with socket.socket(socket.AF_INET, kind) as listening:
        listening.bind(("127.0.0.1", 0))
        listening.settimeout(0.3)
        if kind == socket.SOCK_STREAM:
            listening.listen()
        source = f"import socket; s = socket.socket(2, {kind}); s.connect({listening.getsockname()}); s.send(b'x')"
        heard = listening.accept if kind == socket.SOCK_STREAM else lambda: listening.recvfrom(1)
        assert run_program(source).detail.startswith("PermissionError")
        with pytest.raises(TimeoutError):
            heard()
        in_the_open(source)
        other = heard()[0]
        if isinstance(other, socket.socket):
            other.close()


@pytest.mark.parametrize("family", ["AF_INET6", "AF_UNIX", "AF_NETLINK", "AF_PACKET", "AF_VSOCK", "AF_ALG"])
def test_there_are_no_sockets_of_other_kinds(family):
    assert run_program(f"import socket; socket.socket(socket.{family}, socket.SOCK_DGRAM)").detail.startswith("PermissionError")


@pytest.mark.parametrize(
    "harm",
    [
        "os.kill({0}, 9)",
        "os.killpg({0}, 9)",
        "signal.pidfd_send_signal(os.pidfd_open({0}), 9)",
        "assert ctypes.CDLL(None).syscall({1}, {0}, {0}, 9) == 0",
        "assert ctypes.CDLL(None).ptrace(16, {0}, 0, 0) == 0; time.sleep(5)",
        "resource.prlimit({0}, resource.RLIMIT_CPU, (1, 1))",
        "os.setpriority(os.PRIO_PROCESS, {0}, 19)",
        "os.kill(os.getppid(), 9)",
        "os.kill(os.getppid(), 15)",
        "os.kill(0, 9)",
        "os.kill(-1, 0)",  # 0 harms nobody and needs the same permission: a sandbox with a hole does not end the machine
    ],
)
def test_other_processes_are_out_of_reach(harm):
    with subprocess.Popen(["/bin/sleep", "60"], start_new_session=True) as other:
        try:
            column, _ = sandbox_child.MACHINES[os.uname().machine]
            attack = harm.format(other.pid, sandbox_child.CONDITIONAL["tgkill"][column])
            outcome = run_program(f"import ctypes, os, resource, signal, time\n{attack}")
            assert outcome.status == "failed"
            assert re.match("PermissionError|AssertionError|AttributeError|ValueError: not allowed", outcome.detail)
            assert other.poll() is None
            assert os.getpriority(os.PRIO_PROCESS, other.pid) == os.getpriority(os.PRIO_PROCESS, 0)
        finally:
            other.kill()


def test_a_fork_bomb_does_not_go_off():
    bomb = "import os\nfor _ in range(10**4):\n    try: os.fork()\n    except OSError: pass"
    assert run_program(bomb) == Outcome("passed")
    assert run_program("import os\nos.fork()").detail.startswith("PermissionError")
    assert run_program("import multiprocessing as m; m.Process(target=print).start()").status == "failed"
    assert not survivors()


def test_threads_are_bounded_by_the_memory():
    bomb = (
        "import threading, time, _thread\nthreading.stack_size(2**15)\ncount = 0\n"
        "try:\n    while True: _thread.start_new_thread(time.sleep, (100,)); count += 1\n"
        "except BaseException: pass\nassert count > 5000, 'few'"
    )
    assert run_program(bomb).detail in ("AssertionError: few", "MemoryError")


@pytest.mark.parametrize("hog", ["bytearray(2**30)", "x = [0]\nwhile True: x += x", "import mmap; mmap.mmap(-1, 2**30)"])
def test_memory_is_bounded(hog):
    outcome = run_program(hog)
    assert outcome.status == "failed"
    assert re.match("MemoryError|OSError.*Cannot allocate memory", outcome.detail)


@pytest.mark.parametrize("name", ["AS", "CPU", "FSIZE", "NOFILE", "CORE", "STACK"])
def test_a_program_cannot_change_its_limits(name):
    attack = f"import resource as r; old, _ = r.getrlimit(r.RLIMIT_{name}); r.setrlimit(r.RLIMIT_{name}, "
    assert run_program(f"{attack}(r.RLIM_INFINITY, r.RLIM_INFINITY))").status == "failed"
    assert run_program(f"{attack}(old, old))").status == "failed"


def test_privileges_are_gone():
    done = alone("child.give_up_privileges(); print(open('/proc/self/status').read())")
    for name in ("CapPrm", "CapEff", "CapInh", "CapAmb"):
        assert re.search(rf"{name}:\s*0+\n", done.stdout)
    assert "NoNewPrivs:\t1" in done.stdout


def test_a_program_dies_with_who_waits_for_it(tmp_path):
    waiting = """
import json, os, subprocess, sys, time
asked = open(sys.argv[1] + "/asked", "w+")
json.dump({"seconds": 60, "memory_bytes": 2**29, "unsafe": False, "token": "", "parent": os.getpid(),
    "source": "import time; time.sleep(60)"}, asked)
asked.seek(0)
child = subprocess.Popen([sys.executable, "-sSPB", sys.argv[2]], stdin=asked, stdout=subprocess.DEVNULL, start_new_session=True)
print(child.pid, flush=True)
time.sleep(60)
"""
    command = [sys.executable, "-S", "-c", waiting, tmp_path, CHILD]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        time.sleep(0.5)
        assert CHILD.name in Path(f"/proc/{pid}/cmdline").read_text()
        parent.send_signal(signal.SIGKILL)
    for _ in range(50):
        if CHILD.name.encode() not in command_of(pid):
            break
        time.sleep(0.1)
    assert CHILD.name.encode() not in command_of(pid)


def command_of(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()  # empty once it is dead, though nobody has asked how it ended
    except OSError:
        return b""


def test_hashes_are_the_same_each_time():
    details = {run_program("raise Exception(hash('a'), list({'a', 'b', 'c', 'd', 'e'}))").detail for _ in range(3)}
    assert len(details) == 1


@pytest.fixture
def without(tmp_path, monkeypatch):
    """Have the child run with something of its module changed."""

    def change(code):
        child = tmp_path / "child.py"
        child.write_text(
            f"import sys; sys.path.insert(0, {str(CHILD.parent)!r})\nimport sandbox_child as child\n{code}\nchild.main()"
        )
        monkeypatch.setattr(sandbox, "_CHILD", child)

    return change


def test_the_layers_in_force_are_told(without):
    expected = ("privileges", *(["Landlock"] if has_landlock() else []), "seccomp")
    assert layers() == layers(unsafe=True) == expected
    without("child.restrict_files = lambda folders: False")
    assert layers() == ("privileges", "seccomp")
    assert run_program("x = 1") == Outcome("passed")
    without("child.MACHINES = {'pdp11': (0, 0)}\nchild.restrict_files = lambda folders: True")
    assert layers(unsafe=True) == ("privileges", "Landlock")
    with pytest.raises(InputError, match="cannot be held back here"):
        layers()


def test_where_nothing_holds_a_program_back_it_runs_only_if_asked_to(without):
    without("child.MACHINES = {'pdp11': (0, 0)}")
    message = r"cannot be held back here: the system calls of \w+ are not known.*--unsafe-code.*unsafe_code=True.*unsafe=True"
    with pytest.raises(InputError, match=message):
        run_program("x = 1")
    assert run_program("x = 1", unsafe=True) == Outcome("passed")
    assert run_program("bytearray(2**30)", unsafe=True).detail == "MemoryError"
    assert run_program("import time; time.sleep(100)", seconds=1, unsafe=True).status == "timeout"


def test_a_python_that_does_not_start_is_no_outcome(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "_CHILD", tmp_path / "missing.py")
    with pytest.raises(InputError, match=r"missing\.py"):
        run_program("x = 1")


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"seconds": 0}, "seconds should be above 0, got 0"),
        ({"seconds": float("nan")}, "seconds should be above 0"),
        ({"memory_bytes": 2**20}, "memory_bytes should be at least 67108864"),
    ],
)
def test_limits_out_of_range(limits, message):
    with pytest.raises(InputError, match=message):
        run_program("x = 1", **limits)


def test_the_least_memory_is_enough_for_python():
    assert run_program("x = 1", memory_bytes=sandbox.LEAST_MEMORY) == Outcome("passed")


@pytest.mark.parametrize(
    ("column", "headers"), [(0, ["x86_64-linux-gnu/asm/unistd_64.h", "asm/unistd_64.h"]), (1, ["asm-generic/unistd.h"])]
)
def test_the_numbers_of_the_calls_are_the_kernels(column, headers):
    found = [HEADERS / name for name in headers if (HEADERS / name).is_file()]
    if not found:
        pytest.skip("no kernel headers here")
    lines = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", found[0].read_text())
    numbers = {name: int(number) for name, number in lines}
    if column:
        numbers["newfstatat"] = numbers["fstatat"]  # its name where words have 64 bits
    for name, columns in (sandbox_child.ALLOWED | sandbox_child.CONDITIONAL).items():
        assert columns[column] == numbers.get(name), name
