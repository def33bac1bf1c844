"""glibc's allocator, told to keep what it has been given.

By default it returns large tensors' memory at once and fetches it again page by page, which costs a method that allocates
much a good part of its time, and differs between machines. The settings are read when a process starts.
"""

import os
import platform
import sys

SETTINGS = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "4294967296", "MALLOC_TOP_PAD_": "67108864"}


def start_again_with_settings() -> None:
    """Replace this process by the same command under SETTINGS, unless some are set or there is no glibc to heed them."""
    if platform.libc_ver()[0] == "glibc" and not current():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | SETTINGS)


def current() -> dict[str, str]:
    """The settings this process was started with; none: the allocator's defaults."""
    return {name: os.environ[name] for name in SETTINGS if name in os.environ}
