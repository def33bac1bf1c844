"""Versions and hardware, as bug reports and runs record them."""

import os
import platform
from importlib import metadata
from typing import Any

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
