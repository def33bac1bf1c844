"""Everything up to the first step: settings, data and model read and checked, nothing written."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import TaskType, get_peft_model
from transformers import set_seed

from bonetune.data import Encoded, Lengths, RowFormat, encode_rows, read_rows
from bonetune.errors import InputError
from bonetune.models import Loaded, load_base
from bonetune.training.config import RunConfig, load_config, make_config, parse_overrides
from bonetune.training.folder import claim, step_of
from bonetune.training.learning_rate import default_learning_rate, lora_sized
from bonetune.tuner import BoneConfig

# How many training prompts a run keeps beside its adapter, for the certificate of a merge.
KEPT_PROMPTS = 16


@dataclass(frozen=True)
class Plan:
    """A run that has passed all checks and can start."""

    config: RunConfig
    loaded: Loaded
    model: Any
    train: list[Encoded]
    evaluation: list[Encoded] | None
    lengths: Lengths
    learning_rate: float
    notes: list[str]
    prompts: list[str]
    checkpoint: Path | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run, on one device."""
        config = self.config
        if config.max_steps is not None:
            return config.max_steps
        batches = -(-len(self.train) // config.per_device_train_batch_size)
        return math.ceil(config.num_train_epochs * math.ceil(batches / config.gradient_accumulation_steps))

    @property
    def trainable_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def describe(self) -> str:
        """The run in two sentences, for people."""
        config, lengths = self.config, self.lengths
        total = sum(p.numel() for p in self.model.parameters())
        dropped = f" ({lengths.dropped} longer ones dropped)" if lengths.dropped else ""
        return (
            f"{config.variant}, r={config.r}: {self.trainable_parameters:,} trainable parameters "
            f"({100 * self.trainable_parameters / total:.2f}% of {total:,}) on {self.loaded.base}. "
            f"{lengths.examples:,} examples{dropped}, {lengths.tokens:,} tokens of which {lengths.supervised:,} supervised, "
            f"the longest {lengths.longest}; {self.steps:,} steps, peak learning rate {self.learning_rate:g}."
        )


def plan(
    config: RunConfig | str | Path | dict[str, Any],
    overrides: dict[str, Any] | list[str] | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> Plan:
    """Do everything up to the first step, as `train` does: read and check the data, load the model, put the adapter in.

    Nothing is written. Arguments and errors are those of `train`.
    """
    config = _resolved(config, overrides)
    checkpoint = claim(config, resume=resume, overwrite=overwrite)
    rows = read_rows(config.dataset_name, config.dataset_split)
    row_format = RowFormat.detect(rows[0], config.dataset_field, config.prompt_template)
    loaded = load_base(config.model_name_or_path, config.dtype)
    encoded, lengths = encode_rows(rows, row_format, loaded.tokenizer, config.max_length, config.truncation)
    evaluation = None
    if config.eval_dataset_name is not None:
        held_out = read_rows(config.eval_dataset_name, config.eval_dataset_split)
        evaluation, _ = encode_rows(held_out, row_format, loaded.tokenizer, config.max_length, config.truncation)
    rate, notes = _learning_rate(config)
    set_seed(config.seed)
    model = get_peft_model(loaded.model, adapter_config(config))
    _check_saved_modules(config, model)
    kept = [rows[example.row - 1] for example in encoded[:KEPT_PROMPTS]]
    prompts = [row_format.question_and_answer(row, loaded.tokenizer)[0] for row in kept]
    planned = Plan(config, loaded, model, encoded, evaluation, lengths, rate, notes, prompts, checkpoint)
    if checkpoint is not None and step_of(checkpoint) >= planned.steps:
        raise InputError(
            f"The run in {config.output_dir} has done its {planned.steps} steps: raise max_steps or num_train_epochs to go on."
        )
    return planned


def _check_saved_modules(config: RunConfig, model: Any) -> None:
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    unknown = [name for name in config.modules_to_save or () if name.rpartition(".")[2] not in names]
    if unknown:
        raise InputError(f"modules_to_save names modules that the model does not have: {', '.join(unknown)}.")


def adapter_config(config: RunConfig) -> BoneConfig:
    """The `BoneConfig` that a run's settings describe."""
    return BoneConfig(
        r=config.r,
        variant=config.variant,
        mini_r=config.mini_r,
        target_modules=_listed(config.target_modules),
        exclude_modules=_listed(config.exclude_modules),
        rank_pattern=dict(config.rank_pattern),
        bone_dropout=config.bone_dropout,
        exact_update=config.exact_update,
        bias=config.bias,
        layers_to_transform=None if config.layers_to_transform is None else list(config.layers_to_transform),
        modules_to_save=None if config.modules_to_save is None else list(config.modules_to_save),
        task_type=TaskType.CAUSAL_LM,
    )


def _resolved(config: RunConfig | str | Path | dict[str, Any], overrides: dict[str, Any] | list[str] | None) -> RunConfig:
    if isinstance(config, str | Path):
        return load_config(config, overrides)
    if isinstance(config, dict):
        return make_config(config | _mapping(overrides))
    return make_config(config.model_dump() | _mapping(overrides)) if overrides else config


def _mapping(overrides: dict[str, Any] | list[str] | None) -> dict[str, Any]:
    return parse_overrides(overrides) if isinstance(overrides, list) else overrides or {}


def _learning_rate(config: RunConfig) -> tuple[float, list[str]]:
    default = default_learning_rate(config.spec)
    if config.learning_rate is None:
        return default, []
    if not lora_sized(config.learning_rate, config.spec):
        return config.learning_rate, []
    note = (
        f"learning_rate={config.learning_rate:g} is of LoRA's size. {config.variant} with r={config.r} moves every weight by "
        f"about the learning rate each step; runs this far above {default:g}, the default here, tend to fall apart."
    )
    warnings.warn(note, stacklevel=2)
    return config.learning_rate, [note]


def _listed(names: str | Sequence[str] | None) -> str | list[str] | None:
    return names if names is None or isinstance(names, str) else list(names)
