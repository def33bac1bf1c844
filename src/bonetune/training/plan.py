"""Everything up to the first step: settings, data and model read and checked, nothing written."""

import importlib.util
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import TaskType, get_peft_model
from transformers import set_seed

from bonetune.data import Encoded, EncodedSet, ExampleStream, Finding, Lengths, RowFormat, prepare, stream
from bonetune.data.batches import Batch, BatchPlan
from bonetune.diagnostics import lacks_instructions_for
from bonetune.errors import InputError
from bonetune.losses import check_loss
from bonetune.models import Loaded, load_base, load_tokenizer, packed_attention, packing_obstacle
from bonetune.rwkv import parameters_of
from bonetune.training import baselines
from bonetune.training.baselines import Adapted
from bonetune.training.checkpoints import step_of
from bonetune.training.config import RunConfig, load_config, make_config
from bonetune.training.folder import claim, finished
from bonetune.training.learning_rate import default_learning_rate, lora_sized
from bonetune.training.loader import muted
from bonetune.training.settings import AdapterSettings
from bonetune.training.tasks import ABOUT, Task, task_named
from bonetune.tuner import BoneConfig, set_backend, train_whole_modules_in_float32
from bonetune.tuner.dequantize import keep_readable

# How many training prompts a run keeps beside its adapter, for the certificate of a merge.
KEPT_PROMPTS = 16
# What a checkpoint says of the data it was trained on.
DATA_FILE = "data.json"


@dataclass(frozen=True)
class Plan:
    """A run that has passed all checks and can start.

    Args:
        config: the settings.
        task: what the model is trained for.
        loaded: base model and tokenizer.
        model: the model to train: the base with its adapter, or, for the baseline `full`, the base itself.
        train: the training examples; of a stream, its first ones.
        stream: where they come from if they are read as they are needed.
        evaluation: held-out examples.
        batches: which examples make which step.
        packing: whether examples are laid end to end.
        lengths: the data in numbers.
        findings: what is remarkable in the data.
        learning_rate: the peak.
        notes: what the user should know.
        prompts: questions of the training set with their answers, for reports and certificates.
        opened: whether a chat template made them.
        row_format: how the (first) data set's rows are read.
        world: number of devices.
        checkpoint: where the run goes on from.
        classes: a classifier's; none for regression; None for other tasks.
        supervised: (examples,), what each training example adds to the number that a step's loss is divided by.
        init_seconds: that putting the adapter in took, with all that it begins with computed; of a run that goes on, what it
            took when it was started.
    """

    config: RunConfig
    task: Task
    loaded: Loaded
    model: Any
    train: EncodedSet
    stream: ExampleStream | None
    evaluation: EncodedSet | None
    batches: BatchPlan
    packing: bool
    lengths: Lengths
    findings: tuple[Finding, ...]
    learning_rate: float
    notes: list[str]
    prompts: list[tuple[str, str]]
    opened: bool
    row_format: RowFormat
    world: int = 1
    checkpoint: Path | None = None
    classes: tuple[str, ...] | None = None
    supervised: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    init_seconds: float = 0.0

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.config.max_steps is not None:
            return self.config.max_steps
        return math.ceil(round(self.config.num_train_epochs * self.batches.steps, 6))

    @property
    def trainable_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @cached_property
    def collate(self) -> Callable[[Sequence[Encoded]], Batch]:
        """Examples to tensors."""
        return self.task.collator(self.loaded.tokenizer.pad_token_id, self.packing)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What must be the same for a run to go on as it would have gone: its examples, and how many make a step."""
        return {"examples": self.train.fingerprint(), "batch_size": self.batches.batch_size}

    def attention(self) -> AbstractContextManager[object]:
        """To be open while the model is trained: how it attends to packed examples."""
        return packed_attention(self.loaded.model, self.config.attn_implementation) if self.packing else nullcontext()

    def batch(self, examples: Sequence[Encoded]) -> Batch:
        """Examples as one forward's batch that is a whole step."""
        members = EncodedSet(examples)
        counted = {"supervised": int(self.task.supervised(members).sum()), "tokens": int(members.lengths.sum())}
        return self.collate(examples) | counted | {"examples": []}

    def worst_batch(self) -> Batch:
        """The longest examples of all in one forward: no batch of the run is larger."""
        longest = np.argsort(-self.train.lengths, kind="stable")[: self.config.per_device_train_batch_size]
        numbers = longest if self.stream is None else self.train.rows[longest]
        return self.batch([self.train[int(i)] for i in longest]) | {"examples": numbers.tolist()}

    def evaluation_batches(self, world: int = 1, rank: int = 0) -> Iterator[Batch]:
        """This device's batches of the evaluation set, the longest examples first; equally many on each device."""
        examples = self.evaluation or EncodedSet([])
        size = self.config.per_device_eval_batch_size or self.config.per_device_train_batch_size
        order = np.argsort(-examples.lengths, kind="stable")
        cut = [order[start : start + size] for start in range(0, len(order), size)]
        for number in range(rank, -(-len(cut) // world) * world, world):
            if number < len(cut):
                yield self.batch([examples[int(i)] for i in cut[number]])
            else:  # all devices take part in each forward
                yield self.batch([muted(examples[int(order[-1])])]) | {"supervised": 0}

    def describe_examples(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Examples for people: row, tokens, text."""
        examples = [(number, self.train[number]) for number in numbers] if self.stream is None else []
        decode = self.loaded.tokenizer.decode
        found = [{"row": e.row, "tokens": len(e.input_ids), "text": decode(e.input_ids)} for _, e in examples]
        return found or [{"row": number} for number in numbers]

    def summary(self) -> dict[str, Any]:
        """The run in numbers, as summary.json holds it."""
        config, lengths = self.config, self.lengths
        return {
            "base": self.loaded.base,
            "method": config.method,
            **_sizes(config),
            "init_seconds": self.init_seconds,
            "trainable_parameters": self.trainable_parameters,
            "total_parameters": sum(p.numel() for p in self.model.parameters()),
            "row_format": {
                "kind": self.row_format.kind,
                "fields": list(self.row_format.fields),
                "conversational": self.opened,
            },
            "examples": lengths.examples,
            "tokens": lengths.tokens,
            "supervised": lengths.supervised,
            "longest": lengths.longest,
            "steps": self.steps,
            "learning_rate": self.learning_rate,
            "classes": self.classes,
            "packing": self.packing,
            "devices": self.world,
            "notes": self.notes,
            "findings": [asdict(finding) for finding in self.findings],
        }

    def describe(self) -> str:
        """The run in a few sentences, for people."""
        config, lengths = self.config, self.lengths
        total = sum(p.numel() for p in self.model.parameters())
        out = lengths.dropped + lengths.silenced
        dropped = f" ({out} too long ones left out)" if out else ""
        devices = f" on {self.world} devices" if self.world > 1 else ""
        first = "The first " if self.stream else ""
        return (
            f"{config.method_in_words}: {self.trainable_parameters:,} trainable parameters "
            f"({100 * self.trainable_parameters / total:.2f}% of {total:,}) on {self.loaded.base}. "
            f"{first}{lengths.examples:,} examples{dropped}, {lengths.tokens:,} tokens of which {lengths.supervised:,} are "
            f"supervised, the longest {lengths.longest}; {self.steps:,} steps of {self.batches.batch_size} examples{devices}, "
            f"{'packed' if self.packing else 'padded'}; peak learning rate {self.learning_rate:g}."
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
    config = resolved(config, overrides)
    _check_surroundings(config)
    checkpoint = claim(config, resume=resume, overwrite=overwrite)
    task = task_of(config)
    tokenizer = tokenizer_of(config)
    data = read_data(config, tokenizer)
    set_seed(config.seed)  # a classifier's head is drawn when it is loaded
    loaded = load_base(
        config.model_name_or_path, config.dtype, **model_options(config), classes=data.classes, tokenizer=tokenizer
    )
    rate, notes = _learning_rate(config)
    vocabulary = getattr(loaded.model.get_input_embeddings(), "num_embeddings", 0)
    _check_tokenizer(config, tokenizer, vocabulary)
    keep_readable(loaded.model)  # before it answers for the first time
    packing, why_not = _packing(config, loaded.model)
    world = int(os.environ.get("WORLD_SIZE", "1"))  # as torchrun and accelerate launch set it
    batches = BatchPlan(
        data.train.lengths,
        config.per_device_train_batch_size * config.gradient_accumulation_steps * world,
        config.seed,
        group_by_length=config.group_by_length and not packing,
        sources=data.sources,
        weights=config.dataset_weights,
    )
    planned = Plan(
        config=config,
        task=task,
        loaded=loaded,
        model=loaded.model,
        train=data.train,
        stream=data.stream,
        evaluation=data.evaluation,
        batches=batches,
        packing=packing,
        lengths=data.lengths,
        findings=data.findings,
        learning_rate=rate,
        notes=[*notes, *why_not, *_slowness(config, loaded.model), *(finding.message for finding in data.findings)],
        prompts=data.prompts,
        opened=data.opened,
        row_format=data.row_format,
        world=world,
        checkpoint=checkpoint,
        classes=data.classes,
        supervised=task.supervised(data.train),
    )
    if checkpoint is not None:
        _check_continues(planned, checkpoint)
    adapted = _adapted(planned)
    _check_saved_modules(config, adapted.model)
    by_chunks = config.task_type == "CAUSAL_LM" and vocabulary and check_loss(adapted.model, vocabulary)
    if config.bptt_length is not None and not (by_chunks and getattr(loaded.model, "carries_state", False)):
        raise InputError(
            f"bptt_length is for models that carry a state from one token to the next, and {type(loaded.model).__name__} does "
            "not: leave it out."
        )
    return replace(planned, model=adapted.model, init_seconds=adapted.seconds, notes=planned.notes + adapted.notes)


def _adapted(planned: Plan) -> Adapted:
    """The model to train. It begins as the seed says, whatever was drawn before."""
    config, base, checkpoint = planned.config, planned.loaded.model, planned.checkpoint
    set_seed(config.seed)
    if config.baseline is None:
        began = time.perf_counter()
        model = get_peft_model(base, adapter_config(config, base))
        train_whole_modules_in_float32(model)
        set_backend(model, config.backend)
        adapted = Adapted(model, time.perf_counter() - began)
    else:
        initial = checkpoint.parent / baselines.INITIAL_FOLDER if checkpoint is not None else None
        adapted = baselines.adapt(config, base, lambda model: _estimate(planned, model), initial)
    if checkpoint is None:
        return adapted
    written = json.loads((checkpoint / DATA_FILE).read_text(encoding="utf-8"))
    return replace(adapted, seconds=written.get("init_seconds", adapted.seconds))


def _estimate(planned: Plan, model: Any) -> None:
    """Add up the gradients of the run's loss on its first batches, as many as LoRA-GA is to look at."""
    config = planned.config
    left = config.baseline_kwargs.get("gradient_batches", baselines.GRADIENT_BATCHES)
    device, size = next(model.parameters()).device, config.per_device_train_batch_size
    numbers = (step[start : start + size] for step in planned.batches.epoch(0) for start in range(0, len(step), size))
    with planned.attention(), torch.autocast(device.type, torch.bfloat16, config.bf16):
        for _, some in zip(range(left), numbers, strict=False):
            batch = planned.batch([planned.train[int(number)] for number in some])
            inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items() if k not in ABOUT}
            planned.task.loss(model, **inputs, supervised=max(batch["supervised"], 1)).backward()


def _sizes(config: RunConfig) -> dict[str, Any]:
    if config.baseline is None:
        return {"variant": config.variant, "r": config.r}
    r = {} if config.baseline == "full" else {"r": config.r}
    return r | ({"baseline_kwargs": config.baseline_kwargs} if config.baseline_kwargs else {})


def _check_surroundings(config: RunConfig) -> None:
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


def _packing(config: RunConfig, model: Any) -> tuple[bool, list[str]]:
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


def _check_continues(planned: Plan, checkpoint: Path) -> None:
    written = json.loads((checkpoint / DATA_FILE).read_text(encoding="utf-8"))
    if written["examples"] != planned.fingerprint["examples"]:
        raise InputError(
            f"The training data is not what the run in {checkpoint.parent} was started with (its content, the tokenizer or the "
            "way it is read has changed): resume with the old data, or start a new run."
        )
    if written["batch_size"] != planned.batches.batch_size:
        raise InputError(
            f"The run in {checkpoint.parent} makes steps of {written['batch_size']} examples, now they would have "
            f"{planned.batches.batch_size}: choose per_device_train_batch_size x gradient_accumulation_steps x devices "
            "to the same product."
        )
    if step_of(checkpoint) >= planned.steps and finished(checkpoint.parent):
        raise InputError(
            f"The run in {checkpoint.parent} has done its {planned.steps} steps: raise max_steps or num_train_epochs to go on."
        )


def _check_tokenizer(config: RunConfig, tokenizer: Any, vocabulary: int) -> None:
    if config.tokenizer_name_or_path is not None and 0 < vocabulary < len(tokenizer):
        raise InputError(
            f"tokenizer_name_or_path {config.tokenizer_name_or_path} has {len(tokenizer)} tokens, and "
            f"{config.model_name_or_path} has embeddings for {vocabulary}: choose one that was made for the model."
        )


def _check_saved_modules(config: RunConfig, model: Any) -> None:
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    unknown = [name for name in config.modules_to_save or () if name.rpartition(".")[2] not in names]
    if unknown:
        raise InputError(f"modules_to_save names modules that the model does not have: {', '.join(unknown)}.")


def tokenizer_of(config: RunConfig) -> Any:
    """The tokenizer that a run's settings name, as `bonetune.models.load_tokenizer` loads it."""
    name = config.tokenizer_name_or_path or config.model_name_or_path
    return load_tokenizer(name, trust_remote_code=config.trust_remote_code, eos_token=config.eos_token)


def task_of(config: RunConfig) -> Task:
    """What a run's settings train for, with the loss that they ask for."""
    return task_named(config.task_type, bptt_length=config.bptt_length, l2_wrap=config.l2_wrap)


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


def resolved(config: RunConfig | str | Path | dict[str, Any], overrides: dict[str, Any] | list[str] | None = None) -> RunConfig:
    """The settings that a file, a mapping or a `RunConfig` gives together with overrides."""
    if isinstance(config, str | Path):
        return load_config(config, overrides)
    if isinstance(config, dict):
        return make_config(config, overrides)
    return make_config(config.model_dump(), overrides) if overrides else config


def _learning_rate(config: RunConfig) -> tuple[float, list[str]]:
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


def _slowness(config: RunConfig, model: Any) -> list[str]:
    """What to know of the run's dtype on this computer."""
    dtypes, remedy = {p.dtype for p in model.parameters()}, "set dtype to float32"
    if config.bf16:
        dtypes, remedy = {torch.bfloat16}, "leave bf16 out"
    return [
        f"This CPU has no instructions for {str(dtype)[6:]}: training may take twenty times as long as in float32; {remedy}."
        for dtype in dtypes
        if lacks_instructions_for(dtype)
    ]


def _listed(value: Any) -> Any:
    """Tuples, which settings hold, as the lists that PEFT takes; mappings as ones of their own."""
    if isinstance(value, tuple):
        return list(value)
    return {name: _listed(entry) for name, entry in value.items()} if isinstance(value, dict) else value
