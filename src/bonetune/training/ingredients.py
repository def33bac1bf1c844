"""What a run's settings name, each made by itself: its task, tokenizer, data, the model's options, the adapter's config."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from peft import TaskType

from bonetune.data import EncodedSet, ExampleStream, Finding, Lengths, RowFormat, prepare, stream
from bonetune.errors import InputError
from bonetune.models import load_tokenizer
from bonetune.rwkv import parameters_of
from bonetune.training.config import RunConfig, load_config, make_config
from bonetune.training.settings import AdapterSettings
from bonetune.training.tasks import Task, task_named
from bonetune.tuner import BoneConfig

# How many training prompts a run keeps beside its adapter, for the certificate of a merge.
KEPT_PROMPTS = 16


def resolved(config: RunConfig | str | Path | dict[str, Any], overrides: dict[str, Any] | list[str] | None = None) -> RunConfig:
    """The settings that a file, a mapping or a `RunConfig` gives together with overrides."""
    if isinstance(config, str | Path):
        return load_config(config, overrides)
    if isinstance(config, dict):
        return make_config(config, overrides)
    return make_config(config.model_dump(), overrides) if overrides else config


def task_of(config: RunConfig) -> Task:
    """What a run's settings train for, with the loss that they ask for."""
    return task_named(config.task_type, bptt_length=config.bptt_length, l2_wrap=config.l2_wrap)


def tokenizer_of(config: RunConfig) -> Any:
    """The tokenizer that a run's settings name, as `bonetune.models.load_tokenizer` loads it."""
    name = config.tokenizer_name_or_path or config.model_name_or_path
    return load_tokenizer(name, trust_remote_code=config.trust_remote_code, eos_token=config.eos_token)


def model_options(config: RunConfig) -> dict[str, Any]:
    """How a run's settings have its model loaded, as `bonetune.models.load_base` takes it."""
    return {
        "task_type": config.task_type,
        "quantization": config.quantization,
        "double_quantization": config.bnb_4bit_use_double_quant,
        "attn_implementation": config.attn_implementation,
        "trust_remote_code": config.trust_remote_code,
        "initial_state": "state" in config.train_parts,
    }


def adapter_config(config: RunConfig, model: Any) -> BoneConfig:
    """The `BoneConfig` that a run's settings describe, for a model that has no adapter yet."""
    settings = {name: _listed(getattr(config, name)) for name in AdapterSettings.model_fields}
    if config.train_parts:
        if isinstance(config.trainable_parameters, str):
            raise InputError("trainable_parameters is a regular expression, and train_parts names parts: name the parameters.")
        settings["trainable_parameters"] = [*(config.trainable_parameters or ()), *parameters_of(model, config.train_parts)]
    return BoneConfig(**settings, task_type=TaskType(config.task_type))


@dataclass(frozen=True)
class Data:
    """What a run learns from, is evaluated on, and says about it."""

    train: EncodedSet
    stream: ExampleStream | None
    evaluation: EncodedSet | None
    sources: np.ndarray | None
    lengths: Lengths
    findings: tuple[Finding, ...]
    prompts: list[tuple[str, str]]
    opened: bool
    row_format: RowFormat
    classes: tuple[str, ...] | None = None


def read_data(config: RunConfig, tokenizer: Any) -> Data:
    """The examples that a run's settings describe."""
    shared = {
        "task_type": config.task_type,
        "dataset_name": config.dataset_name,
        "dataset_split": config.dataset_split,
        "dataset_weights": config.dataset_weights,
        "dataset_format": config.dataset_format,
        "dataset_field": config.dataset_field,
        "prompt_template": config.prompt_template,
        "completion_only_loss": config.completion_only_loss,
        "eval_dataset_name": config.eval_dataset_name,
        "eval_dataset_split": config.eval_dataset_split,
        "max_length": config.max_length,
        "truncation": config.truncation,
        "cache_tokens": config.cache_tokens,
        "seed": config.seed,
        "kept_prompts": KEPT_PROMPTS,
    }
    if config.streaming:
        source = stream(tokenizer, eval_size=config.eval_size, **shared)
        return Data(
            train=source.head,
            stream=source,
            evaluation=source.evaluation,
            sources=None,
            lengths=source.lengths,
            findings=source.findings,
            prompts=source.prompts,
            opened=source.opened,
            row_format=source.row_formats[0],
        )
    found = prepare(tokenizer, eval_size=config.eval_size, num_labels=config.num_labels, **shared)
    return Data(
        train=found.train,
        stream=None,
        evaluation=found.evaluation,
        sources=found.sources if config.dataset_weights is not None else None,
        lengths=found.lengths,
        findings=found.findings,
        prompts=found.prompts,
        opened=found.opened,
        row_format=found.row_formats[0],
        classes=found.classes,
    )


def _listed(value: Any) -> Any:
    """Tuples, which settings hold, as the lists that PEFT takes; mappings as ones of their own."""
    if isinstance(value, tuple):
        return list(value)
    return {name: _listed(entry) for name, entry in value.items()} if isinstance(value, dict) else value
