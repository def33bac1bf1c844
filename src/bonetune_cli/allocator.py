"""glibc's allocator, told to keep what it has been given.

By default it returns large tensors' memory at once and fetches it again page by page, which costs training on a CPU a tenth to
a third of its time. The settings are read when a process starts, so the process starts again with them, before it has imported
or opened anything: by `execve`, which keeps its number, its parent, its streams and its environment. `torchrun` and others that
wait for it, send it signals or read its output notice nothing.
"""

import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

SETTINGS = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "4294967296", "MALLOC_TOP_PAD_": "67108864"}


def start_again_with_settings() -> None:
    """Replace this process by the same command under SETTINGS.

    Nothing happens where some of them are set already (set one to have glibc's defaults for the rest), without glibc, or on a
    machine with an NVIDIA GPU, where tensors lie elsewhere.
    """
    if wanted(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | SETTINGS)  # noqa: S606  (this very command)


def wanted(environment: Mapping[str, str]) -> bool:
    """Whether the settings would do something that nobody has decided yet."""
    return platform.libc_ver()[0] == "glibc" and not current(environment) and not Path("/dev/nvidiactl").exists()


def current(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The settings that a process was started with; none: the allocator's defaults."""
    return {name: environment[name] for name in SETTINGS if name in environment}
