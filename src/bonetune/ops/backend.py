"""By what the operations on shards are computed: PyTorch's own, or the Triton kernels of `bonetune.ops.kernels`."""

import os
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor

from bonetune.errors import InputError
from bonetune.ops.shards import FEW_ROWS

Backend = Literal["auto", "torch", "triton"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
# What the kernels are written for: tensor cores want r = 16 at least, and at 256 two blocks no longer fit on chip.
SIZES = (16, 32, 64, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# The oldest GPUs they are compiled for in the tests, by compute capability: A100 and RTX 30.
OLDEST = (8, 0)
# With fewer rows it is what is called that costs.
FEWEST_ROWS = FEW_ROWS + 1
INSTALLED = find_spec("triton") is not None  # asked once: layers ask for the kernels at each call


def use_kernels(backend: Backend, x: Tensor, sizes: Iterable[int], fewest: int = FEWEST_ROWS) -> bool:
    """Whether the updates of `x` (..., in) with these r go through the Triton kernels.

    auto: where x is on an NVIDIA GPU of compute capability 8.0 or newer and Triton is installed, x is of a dtype in `DTYPES`
    and has at least `fewest` rows, and each r is in `SIZES`. Everything else, and torch: PyTorch's operations.

    Raises:
        InputError: another backend, or triton where it cannot be.
    """
    if backend == "torch" or (backend == "auto" and not x.is_cuda):
        return False
    if backend not in BACKENDS:
        raise InputError(f"Unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}.")
    against = _against_kernels(x, sizes)
    if backend == "triton" and against:
        raise InputError(f"backend='triton': {against}. Use backend='auto', which takes PyTorch's operations there.")
    return not against and (backend == "triton" or x.numel() >= fewest * x.shape[-1])


def _against_kernels(x: Tensor, sizes: Iterable[int]) -> str:
    """Why the kernels cannot be used, or nothing."""
    if not INSTALLED:
        return "Triton is not installed: pip install 'bonetune[triton]'"
    if x.dtype not in DTYPES:
        return f"the kernels take {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}, not {str(x.dtype)[6:]}"
    if other := sorted(set(sizes) - set(SIZES)):
        return f"the kernels take r of {', '.join(map(str, SIZES))}, not {other[0]}"
    if x.is_cuda:
        if torch.version.hip is None and torch.cuda.get_device_capability(x.device) >= OLDEST:
            return ""
        return f"the kernels want an NVIDIA GPU of compute capability {OLDEST[0]}.{OLDEST[1]} or newer"
    if x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return ""  # Triton's interpreter, for tests
    return f"the kernels want an NVIDIA GPU, and x is on {x.device}"
