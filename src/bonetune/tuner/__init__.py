"""The PEFT tuner. Only this room knows PEFT's internals."""

from bonetune.tuner.config import BoneConfig
from bonetune.tuner.layer import BoneLayer, BoneLinear
from bonetune.tuner.miss import accelerate_miss
from bonetune.tuner.model import BoneModel
from bonetune.tuner.registry import register

__all__ = ["BoneConfig", "BoneLayer", "BoneLinear", "BoneModel", "accelerate_miss", "register"]
