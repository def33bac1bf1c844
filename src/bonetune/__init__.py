"""Bone, BAT and MiSS fine-tuning (arXiv 2409.15371) for every model that PEFT can reach.

Importing this package makes peft_type "BONE" known to PEFT: `peft.get_peft_model(model, bonetune.BoneConfig(r=64))`.
The command line's verbs are functions here: `train`, `evaluate`, `compare`, `merge`, `demo`, `environment`, and the class
`Chat`; they are imported when first used, and so is `bonetune.rwkv`, with RWKV's models.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bonetune.errors import AdapterFileError, BonetuneError, InputError, RunError, SpecError, TargetError
from bonetune.spec import VARIANTS, ShardSpec
from bonetune.tuner import (
    BoneConfig,
    BoneConv,
    BoneEmbedding,
    BoneLayer,
    BoneLinear,
    BoneModel,
    accelerate_miss,
    hotswap_adapter,
    register,
    set_backend,
)

if TYPE_CHECKING:
    from bonetune.conversion import convert
    from bonetune.demonstration import demo
    from bonetune.diagnostics import environment
    from bonetune.evaluation import Chat, Judge, evaluate
    from bonetune.experiments import compare
    from bonetune.hub import pull, push
    from bonetune.merging import merge
    from bonetune.tokenization import tokenize
    from bonetune.training import train

register()

__version__ = "0.1.0"

__all__ = [
    "VARIANTS",
    "AdapterFileError",
    "BoneConfig",
    "BoneConv",
    "BoneEmbedding",
    "BoneLayer",
    "BoneLinear",
    "BoneModel",
    "BonetuneError",
    "Chat",
    "InputError",
    "Judge",
    "RunError",
    "ShardSpec",
    "SpecError",
    "TargetError",
    "accelerate_miss",
    "compare",
    "convert",
    "demo",
    "environment",
    "evaluate",
    "hotswap_adapter",
    "merge",
    "pull",
    "push",
    "set_backend",
    "tokenize",
    "train",
]

_VERBS = {
    "Chat": "bonetune.evaluation",
    "Judge": "bonetune.evaluation",
    "compare": "bonetune.experiments",
    "convert": "bonetune.conversion",
    "demo": "bonetune.demonstration",
    "environment": "bonetune.diagnostics",
    "evaluate": "bonetune.evaluation",
    "merge": "bonetune.merging",
    "pull": "bonetune.hub",
    "push": "bonetune.hub",
    "tokenize": "bonetune.tokenization",
    "train": "bonetune.training",
}


def __getattr__(name: str) -> Any:
    if name in _VERBS:
        return getattr(import_module(_VERBS[name]), name)
    if name == "rwkv":
        return import_module("bonetune.rwkv")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
