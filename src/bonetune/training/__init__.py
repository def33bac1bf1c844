"""Fine-tuning: configuration, loop, and what a run leaves behind."""

from bonetune.training.config import RunConfig, load_config, make_config
from bonetune.training.learning_rate import default_learning_rate, lora_sized
from bonetune.training.plan import Plan, plan
from bonetune.training.train import TrainResult, train

__all__ = [
    "Plan",
    "RunConfig",
    "TrainResult",
    "default_learning_rate",
    "load_config",
    "lora_sized",
    "make_config",
    "plan",
    "train",
]
