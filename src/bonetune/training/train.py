"""`bonetune train`: the loop is transformers' Trainer, with our batches and loss."""

import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from bonetune.data import Encoded, Lengths, RowFormat, collate, encode_rows, read_rows
from bonetune.errors import InputError
from bonetune.files import folder_written_beside, write_json_lines, write_text
from bonetune.losses import completion_loss
from bonetune.models import Loaded, load_base
from bonetune.training.config import RunConfig, load_config, make_config, parse_overrides
from bonetune.training.learning_rate import default_learning_rate, lora_sized
from bonetune.training.report import Progress, Recorder, plot_loss, read_metrics
from bonetune.tuner import BoneConfig

RUN_FILE, METRICS_FILE, PROMPTS_FILE, PLOT_FILE = "run.yaml", "metrics.jsonl", "prompts.jsonl", "loss.png"
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

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run, on one device."""
        config = self.config
        if config.max_steps is not None:
            return config.max_steps
        batches = -(-len(self.train) // config.per_device_train_batch_size)
        return max(1, -(-int(batches * config.num_train_epochs) // config.gradient_accumulation_steps))

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


@dataclass(frozen=True)
class TrainResult:
    """What a run left: the adapter in `output_dir`, and its numbers."""

    output_dir: str
    steps: int
    trainable_parameters: int
    first_loss: float
    last_loss: float
    seconds: float
    notes: list[str]


def train(
    config: RunConfig | str | Path | dict[str, Any],
    overrides: dict[str, Any] | list[str] | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    on_plan: Callable[[Plan], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> TrainResult:
    """Fine-tune a causal language model with an adapter of the Bone family.

    Args:
        config: settings, or the YAML file that holds them.
        overrides: settings that win over the file's.
        resume: go on from the last checkpoint in `output_dir`.
        overwrite: replace what a run left in `output_dir`.
        on_plan: called once with the checked run, before the first step.
        on_progress: called at each logged step.

    Raises:
        InputError: settings, data or model that cannot be used; nothing is written then.
    """
    config = _resolved(config, overrides)
    folder = Path(config.output_dir)
    checkpoint = _claim(folder, resume=resume, overwrite=overwrite)
    planned = plan(config)
    if on_plan is not None:
        on_plan(planned)
    folder.mkdir(parents=True, exist_ok=True)
    if checkpoint is None:
        _clear(folder)
    write_text(folder / RUN_FILE, config.to_yaml())
    trainer = _trainer(planned, on_progress)
    outcome = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    with folder_written_beside(folder) as beside:
        planned.model.save_pretrained(beside)
        planned.loaded.tokenizer.save_pretrained(beside)
        write_json_lines(beside / PROMPTS_FILE, planned.prompts)
    metrics = read_metrics(folder / METRICS_FILE)
    plot_loss(metrics, folder / PLOT_FILE, f"{config.variant}, r={config.r}, on {Path(planned.loaded.base).name}")
    losses = [line["loss"] for line in metrics if "loss" in line]
    return TrainResult(
        output_dir=config.output_dir,
        steps=trainer.state.global_step,
        trainable_parameters=planned.trainable_parameters,
        first_loss=losses[0],
        last_loss=losses[-1],
        seconds=outcome.metrics["train_runtime"],
        notes=planned.notes,
    )


def plan(config: RunConfig | str | Path | dict[str, Any], overrides: dict[str, Any] | list[str] | None = None) -> Plan:
    """Do everything up to the first step: read and check the data, load the model, put the adapter in."""
    config = _resolved(config, overrides)
    rows = read_rows(config.dataset_name, config.dataset_split)
    row_format = RowFormat.detect(rows[0], config.dataset_field, config.prompt_template)
    loaded = load_base(config.model_name_or_path, config.dtype)
    encoded, lengths = encode_rows(rows, row_format, loaded.tokenizer, config.max_length, config.truncation)
    evaluation = None
    if config.eval_dataset_name is not None:
        held_out = read_rows(config.eval_dataset_name)
        evaluation, _ = encode_rows(held_out, row_format, loaded.tokenizer, config.max_length, config.truncation)
    rate, notes = _learning_rate(config)
    set_seed(config.seed)
    model = get_peft_model(loaded.model, adapter_config(config))
    prompts = [row_format.question_and_answer(row, loaded.tokenizer)[0] for row in rows[:KEPT_PROMPTS]]
    return Plan(config, loaded, model, encoded, evaluation, lengths, rate, notes, prompts)


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
        bias=config.bias,
        layers_to_transform=None if config.layers_to_transform is None else list(config.layers_to_transform),
        modules_to_save=None if config.modules_to_save is None else list(config.modules_to_save),
        task_type="CAUSAL_LM",  # pyright: ignore[reportArgumentType]  (an enum whose members are texts)
    )


class _CompletionTrainer(Trainer):
    """Trainer with `completion_loss`, normalized by the supervised tokens of the whole optimizer step."""

    tokens_seen = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # the loss is already divided by the step's supervised tokens

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        if model.training:
            self.tokens_seen += int(inputs["attention_mask"].sum())
        loss = completion_loss(model, **inputs, supervised=num_items_in_batch)
        return (loss, {"loss": loss}) if return_outputs else loss


def _trainer(planned: Plan, on_progress: Callable[[Progress], None] | None) -> _CompletionTrainer:
    config = planned.config
    arguments = TrainingArguments(
        output_dir=config.output_dir,
        learning_rate=planned.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=round(config.warmup_ratio * planned.steps),
        per_device_train_batch_size=config.per_device_train_batch_size,
        per_device_eval_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        num_train_epochs=config.num_train_epochs,
        max_steps=config.max_steps if config.max_steps is not None else -1,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim=config.optim,
        bf16=config.bf16,
        gradient_checkpointing=config.gradient_checkpointing,
        seed=config.seed,
        logging_steps=config.logging_steps,
        logging_first_step=True,
        save_steps=config.save_steps,
        save_total_limit=config.save_total_limit,
        eval_strategy="no" if planned.evaluation is None else "steps" if config.eval_steps else "epoch",
        eval_steps=config.eval_steps,
        prediction_loss_only=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
    )
    trainer = _CompletionTrainer(
        model=planned.model,
        args=arguments,
        train_dataset=planned.train,  # pyright: ignore[reportArgumentType]  (a list is a map-style data set)
        eval_dataset=planned.evaluation,  # pyright: ignore[reportArgumentType]
        data_collator=collate(planned.loaded.tokenizer.pad_token_id),  # pyright: ignore[reportArgumentType]
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Recorder(Path(config.output_dir) / METRICS_FILE, lambda: trainer.tokens_seen, on_progress))
    return trainer


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


def _left_by_a_run(folder: Path) -> list[Path]:
    names = (RUN_FILE, METRICS_FILE, PROMPTS_FILE, PLOT_FILE, "adapter_config.json", "adapter_model.safetensors")
    return [*(folder / name for name in names if (folder / name).exists()), *folder.glob("checkpoint-*")]


def _claim(folder: Path, *, resume: bool, overwrite: bool) -> Path | None:
    """The checkpoint to go on from, if any. Raises if the folder holds a run and the user has not said what to do with it."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir {folder} is a file.")
    if resume:
        checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        if not checkpoints:
            raise InputError(f"output_dir {folder} holds no checkpoint to resume from.")
        return checkpoints[-1]
    if _left_by_a_run(folder) and not overwrite:
        raise InputError(f"output_dir {folder} already holds a run: pass --overwrite or --resume, or choose another.")
    return None


def _clear(folder: Path) -> None:
    for path in _left_by_a_run(folder):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
