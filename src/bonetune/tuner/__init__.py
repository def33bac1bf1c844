"""The PEFT tuner. Only this room knows PEFT's internals."""

from bonetune.tuner.backends import set_backend
from bonetune.tuner.config import BoneConfig, by_pattern
from bonetune.tuner.convolution import BoneConv
from bonetune.tuner.embedding import BoneEmbedding
from bonetune.tuner.hotswap import hotswap_adapter
from bonetune.tuner.layer import BoneLayer, layers_of
from bonetune.tuner.linear import BoneLinear
from bonetune.tuner.loading import check_tensors, is_of_november_2024
from bonetune.tuner.miss import accelerate_miss
from bonetune.tuner.model import BoneModel
from bonetune.tuner.registry import register
from bonetune.tuner.whole_modules import train_whole_modules_in_float32
from bonetune.tuner.whole_parameters import WholeParameter, whole_parameters_of

__all__ = [
    "BoneConfig",
    "BoneConv",
    "BoneEmbedding",
    "BoneLayer",
    "BoneLinear",
    "BoneModel",
    "WholeParameter",
    "accelerate_miss",
    "by_pattern",
    "check_tensors",
    "hotswap_adapter",
    "is_of_november_2024",
    "layers_of",
    "register",
    "set_backend",
    "train_whole_modules_in_float32",
    "whole_parameters_of",
]
