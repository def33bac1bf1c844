"""Versions and hardware, as bug reports and runs record them."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_PACKAGES = ("bonetune", "torch", "peft", "transformers", "accelerate", "datasets", "trl", "safetensors")


def environment() -> dict[str, Any]:
    """The versions of Python and the packages that matter (None where not installed), processor, threads and devices."""
    import torch

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "mps": torch.backends.mps.is_available(),
        **{package: version(package) for package in _PACKAGES},
    }


def lacks_instructions_for(dtype: "torch.dtype") -> bool:
    """Whether this computer's only processor is a CPU on which torch has no fast products of this narrow dtype."""
    import torch

    if torch.accelerator.is_available() or not torch.backends.mkldnn.is_available():
        return False
    known = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    return dtype in known and not getattr(torch.ops.mkldnn, known[dtype])()


def peak_memory() -> int:
    """The most bytes that this process has held: of the GPU's memory if it uses one, else resident in memory."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and whether there are changes, of the checkout that `folder` is in; None outside of one."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)  # noqa: S603, S607

    try:
        commit = git("rev-parse", "HEAD")
    except OSError:  # no git
        return None
    if commit.returncode:
        return None
    return {"commit": commit.stdout.strip(), "dirty": bool(git("status", "--porcelain").stdout.strip())}
