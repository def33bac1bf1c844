"""The PEFT tuner. Only this room knows PEFT's internals."""

from bonetune.tuner.config import BoneConfig
from bonetune.tuner.convolution import BoneConv
from bonetune.tuner.embedding import BoneEmbedding
from bonetune.tuner.hotswap import hotswap_adapter
from bonetune.tuner.layer import BoneLayer
from bonetune.tuner.linear import BoneLinear
from bonetune.tuner.miss import accelerate_miss
from bonetune.tuner.model import BoneModel
from bonetune.tuner.registry import register
from bonetune.tuner.whole_modules import train_whole_modules_in_float32

__all__ = [
    "BoneConfig",
    "BoneConv",
    "BoneEmbedding",
    "BoneLayer",
    "BoneLinear",
    "BoneModel",
    "accelerate_miss",
    "hotswap_adapter",
    "register",
    "train_whole_modules_in_float32",
]
