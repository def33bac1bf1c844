"""Fine-tuning: configuration, loop, and what a run leaves behind."""

from bonetune.training.aliases import ConfigNotice
from bonetune.training.config import RunConfig, load_config, make_config
from bonetune.training.forecast import expected_seconds
from bonetune.training.learning_rate import default_learning_rate, lora_sized
from bonetune.training.plan import Plan, plan
from bonetune.training.train import TrainResult, train

__all__ = [
    "ConfigNotice",
    "Plan",
    "RunConfig",
    "TrainResult",
    "default_learning_rate",
    "expected_seconds",
    "load_config",
    "lora_sized",
    "make_config",
    "plan",
    "train",
]
