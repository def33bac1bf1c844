"""Everything up to the first step: settings, data and model read and checked, nothing written."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from transformers import set_seed

from bonetune.data import Encoded, EncodedSet, ExampleStream, Finding, Lengths, RowFormat
from bonetune.data.batches import Batch, BatchPlan
from bonetune.models import Loaded, load_base, packed_attention
from bonetune.training import baselines, preflight
from bonetune.training.baselines import Adapted
from bonetune.training.checkpoints import DATA_FILE
from bonetune.training.config import RunConfig
from bonetune.training.folder import claim
from bonetune.training.ingredients import adapter_config, model_options, read_data, resolved, task_of, tokenizer_of
from bonetune.training.loader import muted
from bonetune.training.tasks import ABOUT, Task
from bonetune.tuner import set_backend, train_whole_modules_in_float32
from bonetune.tuner.dequantize import keep_readable


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
    preflight.check_surroundings(config)
    checkpoint = claim(config, resume=resume, overwrite=overwrite)
    task = task_of(config)
    tokenizer = tokenizer_of(config)
    data = read_data(config, tokenizer)
    set_seed(config.seed)  # a classifier's head is drawn when it is loaded
    loaded = load_base(
        config.model_name_or_path, config.dtype, **model_options(config), classes=data.classes, tokenizer=tokenizer
    )
    rate, notes = preflight.decide_learning_rate(config)
    vocabulary = getattr(loaded.model.get_input_embeddings(), "num_embeddings", 0)
    preflight.check_tokenizer(config, tokenizer, vocabulary)
    keep_readable(loaded.model)  # before it answers for the first time
    packing, why_not = preflight.decide_packing(config, loaded.model)
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
        notes=[
            *notes,
            *why_not,
            *preflight.notes_on_speed(config, loaded.model),
            *(finding.message for finding in data.findings),
        ],
        prompts=data.prompts,
        opened=data.opened,
        row_format=data.row_format,
        world=world,
        checkpoint=checkpoint,
        classes=data.classes,
        supervised=task.supervised(data.train),
    )
    if checkpoint is not None:
        preflight.check_continues(checkpoint, planned.fingerprint, planned.steps)
    adapted = _adapted(planned)
    preflight.check_saved_modules(config, adapted.model)
    preflight.check_loss_by_chunks(config, adapted.model, vocabulary)
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
