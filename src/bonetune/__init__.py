"""Bone, BAT and MiSS fine-tuning (arXiv 2409.15371) for every model that PEFT can reach.

Importing this package makes peft_type "BONE" known to PEFT: `peft.get_peft_model(model, bonetune.BoneConfig(r=64))`.
"""

from bonetune.errors import AdapterFileError, BonetuneError, InputError, SpecError
from bonetune.spec import VARIANTS, ShardSpec
from bonetune.tuner import BoneConfig, BoneLayer, BoneLinear, BoneModel, register

register()

__version__ = "0.1.0"

__all__ = [
    "VARIANTS",
    "AdapterFileError",
    "BoneConfig",
    "BoneLayer",
    "BoneLinear",
    "BoneModel",
    "BonetuneError",
    "InputError",
    "ShardSpec",
    "SpecError",
]
