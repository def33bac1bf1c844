"""What must hold before a run's first step, and what its user should know: each check raises `InputError` or gives notes."""

import importlib.util
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from bonetune.diagnostics import lacks_instructions_for
from bonetune.errors import InputError
from bonetune.losses import check_loss
from bonetune.models import packed_attention, packing_obstacle
from bonetune.training.checkpoints import DATA_FILE, step_of
from bonetune.training.config import RunConfig
from bonetune.training.folder import finished
from bonetune.training.learning_rate import default_learning_rate, lora_sized


def check_surroundings(config: RunConfig) -> None:
    """Raise `InputError` if the machine or the folders are not what the settings need."""
    if config.fsdp and not torch.accelerator.is_available():
        raise InputError("fsdp needs GPUs, and there are none here: leave it out, and processes on a CPU train by DDP.")
    if config.fsdp and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        raise InputError("fsdp shares the weights out over several devices, and there is one process: start with torchrun.")
    if config.fp16 and not torch.accelerator.is_available():
        raise InputError("fp16 needs a GPU, and there is none here: use bf16, or neither.")
    for place in config.report_to:
        if importlib.util.find_spec(place) is None:
            raise InputError(f"report_to {place} needs a package that is not installed: pip install {place}")
    if Path(config.output_dir).resolve() == Path(config.model_name_or_path).resolve():
        raise InputError("output_dir is the model's own folder, which a run would write into: choose another.")
    if config.deepspeed is not None and importlib.util.find_spec("deepspeed") is None:
        raise InputError("deepspeed is set, and the package is not installed: pip install deepspeed")


def check_tokenizer(config: RunConfig, tokenizer: Any, vocabulary: int) -> None:
    """Raise `InputError` if a tokenizer that the settings name has more tokens than the model has embeddings."""
    if config.tokenizer_name_or_path is not None and 0 < vocabulary < len(tokenizer):
        raise InputError(
            f"tokenizer_name_or_path {config.tokenizer_name_or_path} has {len(tokenizer)} tokens, and "
            f"{config.model_name_or_path} has embeddings for {vocabulary}: choose one that was made for the model."
        )


def check_saved_modules(config: RunConfig, model: Any) -> None:
    """Raise `InputError` if `modules_to_save` names what the model has not."""
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    unknown = [name for name in config.modules_to_save or () if name.rpartition(".")[2] not in names]
    if unknown:
        raise InputError(f"modules_to_save names modules that the model does not have: {', '.join(unknown)}.")


def check_continues(checkpoint: Path, fingerprint: Mapping[str, Any], steps: int) -> None:
    """Raise `InputError` unless a run of so many steps on this data is what the checkpoint's run was, and has steps left.

    Args:
        fingerprint: of the run's data, as `Plan` gives it and a checkpoint keeps it.
    """
    written, run = json.loads((checkpoint / DATA_FILE).read_text(encoding="utf-8")), checkpoint.parent
    if written["examples"] != fingerprint["examples"]:
        raise InputError(
            f"The training data is not what the run in {run} was started with (its content, the tokenizer or the way it is "
            "read has changed): resume with the old data, or start a new run."
        )
    if written["batch_size"] != fingerprint["batch_size"]:
        raise InputError(
            f"The run in {run} makes steps of {written['batch_size']} examples, now they would have "
            f"{fingerprint['batch_size']}: choose per_device_train_batch_size x gradient_accumulation_steps x devices "
            "to the same product."
        )
    if step_of(checkpoint) >= steps and finished(run):
        raise InputError(f"The run in {run} has done its {steps} steps: raise max_steps or num_train_epochs to go on.")


def check_loss_by_chunks(config: RunConfig, model: Any, vocabulary: int) -> None:
    """Have `check_loss` see whether this model's loss comes by chunks; raise `InputError` if `bptt_length` needs it to."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    by_chunks = config.task_type == "CAUSAL_LM" and vocabulary and check_loss(model, vocabulary)
    if config.bptt_length is not None and not (by_chunks and getattr(base, "carries_state", False)):
        raise InputError(
            f"bptt_length is for models that carry a state from one token to the next, and {type(base).__name__} does not: "
            "leave it out."
        )


def decide_packing(config: RunConfig, model: Any) -> tuple[bool, list[str]]:
    """Whether to pack, and a note if a model that was not told to cannot."""
    if config.packing is False or config.task_type != "CAUSAL_LM" or config.bptt_length is not None:
        return False, []
    with packed_attention(model, config.attn_implementation):
        obstacle = packing_obstacle(model)
    if obstacle is None:
        return True, []
    if config.packing is True:
        raise InputError(f"packing: {obstacle} Set packing: false.")
    return False, [f"Examples are padded, not packed: {obstacle}"]


def decide_learning_rate(config: RunConfig) -> tuple[float, list[str]]:
    """The peak learning rate, and a note if it is of LoRA's size. Raise `InputError` where there is no default."""
    if config.baseline is not None:
        if config.learning_rate is None:
            raise InputError(
                f"learning_rate has a default for the family's variants, none for baseline {config.baseline}: set it."
            )
        return config.learning_rate, []
    default = default_learning_rate(config.spec)
    adapts_layers = config.target_modules != () or config.target_parameters is not None
    if config.learning_rate is None and not adapts_layers:
        raise InputError("learning_rate has a default for adapted layers, and target_modules names none: set it.")
    if config.learning_rate is None:
        return default, []
    if not adapts_layers or not lora_sized(config.learning_rate, config.spec):
        return config.learning_rate, []
    note = (
        f"learning_rate={config.learning_rate:g} is of LoRA's size. {config.variant} with r={config.r} moves every weight by "
        f"about the learning rate each step; runs this far above {default:g}, the default here, tend to fall apart."
    )
    warnings.warn(note, stacklevel=2)
    return config.learning_rate, [note]


def notes_on_speed(config: RunConfig, model: Any) -> list[str]:
    """What to know of the run's dtype on this computer."""
    dtypes, remedy = {p.dtype for p in model.parameters()}, "set dtype to float32"
    if config.bf16:
        dtypes, remedy = {torch.bfloat16}, "leave bf16 out"
    return [
        f"This CPU has no instructions for {str(dtype)[6:]}: training may take twenty times as long as in float32; {remedy}."
        for dtype in dtypes
        if lacks_instructions_for(dtype)
    ]
