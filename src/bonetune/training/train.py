"""`bonetune train`: the loop is transformers' Trainer, with our batches and loss."""

import math
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
from bonetune.data.encoding import IGNORED
from bonetune.errors import InputError, RunError
from bonetune.files import folder_written_beside, usable_folder, write_json_lines, write_text
from bonetune.losses import completion_loss
from bonetune.models import Loaded, load_base
from bonetune.training.config import RunConfig, load_config, make_config, parse_overrides
from bonetune.training.learning_rate import default_learning_rate, lora_sized
from bonetune.training.report import Progress, Recorder, plot_loss, read_metrics
from bonetune.tuner import BoneConfig

RUN_FILE, METRICS_FILE, PROMPTS_FILE, PLOT_FILE = "run.yaml", "metrics.jsonl", "prompts.jsonl", "loss.png"
# What may differ when a run goes on: how long it goes, what it reports and keeps, where it lies.
MAY_CHANGE_ON_RESUME = {
    *("max_steps", "num_train_epochs", "logging_steps", "save_steps", "save_total_limit", "output_dir"),
    *("eval_dataset_name", "eval_dataset_split", "eval_steps"),
}
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
        RunError: the loss or the gradient is no longer a finite number.
    """
    planned = plan(config, overrides, resume=resume, overwrite=overwrite)
    config, folder = planned.config, Path(planned.config.output_dir)
    trainer = _trainer(planned, on_progress)
    if on_plan is not None:
        on_plan(planned)
    if planned.checkpoint is None:
        _clear(folder)
    write_text(folder / RUN_FILE, config.to_yaml())
    outcome = trainer.train(resume_from_checkpoint=str(planned.checkpoint) if planned.checkpoint else None)
    _check_finite(planned.model)
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
    checkpoint = _claim(config, resume=resume, overwrite=overwrite)
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
    if checkpoint is not None and _step_of(checkpoint) >= planned.steps:
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
        if not torch.isfinite(loss):
            raise RunError(
                f"The loss is {loss.item()} at step {self.state.global_step + 1}: the run has fallen apart. "
                "Lower learning_rate; the last checkpoint in output_dir is from before."
            )
        return (loss, {"loss": loss}) if return_outputs else loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss over the supervised tokens of the evaluation set, as `bonetune eval` computes it."""
        model: Any = self.model
        total, tokens, was_training = 0.0, 0, model.training
        model.eval()
        with torch.no_grad():
            for batch in self.get_eval_dataloader(eval_dataset):
                inputs = self._prepare_inputs(batch)
                total += completion_loss(model, **inputs, supervised=1).item()
                tokens += int((inputs["labels"][:, 1:] != IGNORED).sum())
        model.train(was_training)
        metrics = {f"{metric_key_prefix}_loss": total / tokens}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


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
        logging_nan_inf_filter=False,
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


def _claim(config: RunConfig, *, resume: bool, overwrite: bool) -> Path | None:
    """The checkpoint to go on from, if any. Raises if the folder holds a run and the user has not said what to do with it."""
    folder = Path(config.output_dir)
    usable_folder(folder, "output_dir")
    if resume and overwrite:
        raise InputError("--resume goes on with the run in output_dir, --overwrite throws it away: pass one of them.")
    if resume:
        checkpoints = sorted(filter(_is_whole, folder.glob("checkpoint-*")), key=_step_of)
        if not checkpoints:
            raise InputError(f"output_dir {folder} holds no checkpoint to resume from.")
        _check_same_run(folder / RUN_FILE, config)
        return checkpoints[-1]
    if _left_by_a_run(folder) and not overwrite:
        raise InputError(f"output_dir {folder} already holds a run: pass --overwrite or --resume, or choose another.")
    return None


def _is_whole(checkpoint: Path) -> bool:
    files = ("trainer_state.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt")
    return checkpoint.name.rpartition("-")[2].isdigit() and all((checkpoint / name).is_file() for name in files)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _check_same_run(file: Path, config: RunConfig) -> None:
    """Raise if the run to be resumed had other settings than how long it goes and what it reports."""
    before = load_config(file).model_dump()
    changed = [
        f"{name} ({before[name]!r}, now {value!r})"
        for name, value in config.model_dump().items()
        if name not in MAY_CHANGE_ON_RESUME and value != before[name]
    ]
    if changed:
        raise InputError(f"The run in {file.parent} was started with other settings: {'; '.join(changed)}. Start a new one.")


def _check_finite(model: Any) -> None:
    bad = [name for name, parameter in model.named_parameters() if parameter.requires_grad and not parameter.isfinite().all()]
    if bad:
        raise RunError(f"Training left values that are not finite in {bad[0]} and {len(bad) - 1} more. Lower learning_rate.")


def _clear(folder: Path) -> None:
    for path in _left_by_a_run(folder):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
