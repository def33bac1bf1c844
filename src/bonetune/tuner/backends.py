"""By what the adapted layers of a model compute."""

from torch import nn

from bonetune.errors import InputError
from bonetune.ops.backend import BACKENDS, Backend
from bonetune.tuner.linear import BoneLinear
from bonetune.tuner.miss import AcceleratedMissLinear


def set_backend(model: nn.Module, backend: Backend) -> int:
    """Let the adapted Linear layers of a model compute their updates by PyTorch's operations or by the Triton kernels.

    Args:
        model: a model with adapters of the Bone family, or with MiSS adapters after `accelerate_miss`; its layers are changed
            in place.
        backend: torch; triton, an error where its kernels cannot be used; or auto, which layers begin with: the kernels on
            NVIDIA GPUs of compute capability 8.0 and newer with Triton installed, for bfloat16, float16 and float32, r of 16,
            32, 64 or 128, and more than 16 rows (any number for bat, and in a batch of several adapters); else PyTorch. With
            either, PyTorch also computes what there is no kernel for: bone and mini on layers that are not plain Linear ones
            (quantized, sharded, hooked, with dropout, beside bat or bat-left), and bat where x is narrower than W (autocast).
            In a batch of several adapters those of bat go one by one.

    Returns:
        How many layers were told.

    Raises:
        InputError: another backend.
    """
    if backend not in BACKENDS:
        raise InputError(f"Unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}.")
    layers = [module for module in model.modules() if isinstance(module, BoneLinear | AcceleratedMissLinear)]
    for layer in layers:
        layer.backend = backend
    return len(layers)
