"""Settings of published experiments, by name: `preset: paper-7b`. A run's own settings win over them.

A preset says how is trained, never what, on what or where to. Where its sources disagree, its comment says so, and
docs/from-scripts.md has the whole comparison.
"""

import difflib
from typing import Any

from bonetune.errors import InputError

# The paper's LLaMA2-7B on MetaMathQA (arXiv 2409.15371), as run_bone.sh of github.com/JL-er/Bone trained it before 47d6db3.
# That makes 2 x 8 x 4 GPUs = 64 examples a step, where its comment says 128; PEFT's example makes 16, with a warm-up of 0.03.
# Here 64 on one device: on n, divide gradient_accumulation_steps by n.
_PAPER_7B = {
    "variant": "bone",
    "r": 64,
    "target_modules": ["q_proj", "v_proj", "k_proj", "o_proj", "gate_proj", "down_proj", "up_proj"],
    "dtype": "bfloat16",
    "bf16": True,
    "learning_rate": 2e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.0,
    "weight_decay": 0.0,
    "optim": "adamw_torch",
    "num_train_epochs": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 32,
    "gradient_checkpointing": True,
    "max_length": 512,
    "truncation": "right",
    "seed": 42,
    "logging_steps": 1,
    "save_steps": 1000,
    "save_total_limit": 2,
}
# RoBERTa-base on GLUE, as examples/NLU of github.com/microsoft/LoRA trains MNLI and MRPC. Its rate (4e-4 and 5e-4) is LoRA's,
# and left to the default by variant and r; r = 16 gives query and value as many parameters as its LoRA of rank 8.
_GLUE = {
    "task_type": "SEQ_CLS",
    "variant": "bone",
    "r": 16,
    "target_modules": ["query", "value"],
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.06,
    "weight_decay": 0.1,
    "num_train_epochs": 30,
    "per_device_train_batch_size": 16,
    "max_length": 512,
    "truncation": "right",
    "seed": 0,
    "logging_steps": 10,
}
PRESETS: dict[str, dict[str, Any]] = {"paper-7b": _PAPER_7B, "glue": _GLUE}


def preset(name: Any) -> dict[str, Any]:
    """The settings of a preset. Raises `InputError` with the nearest name if there is none of this name."""
    if not isinstance(name, str) or name not in PRESETS:
        near = difflib.get_close_matches(str(name), PRESETS, n=1)
        raise InputError(
            f"There is no preset {name!r}: " + (f"did you mean {near[0]!r}?" if near else f"there are {', '.join(PRESETS)}.")
        )
    return PRESETS[name]
