"""transformers' Trainer with our batches, loss, metrics and checkpoints."""

import json
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from bonetune.data.batches import Batch
from bonetune.errors import DivergedError, InputError, RunError
from bonetune.files import write_json
from bonetune.training import baselines, checkpoints
from bonetune.training.config import HEEDING_EVALUATIONS
from bonetune.training.folder import BAD_BATCH_FILE, METRICS_FILE
from bonetune.training.learning_rate import WHOLE_MODULE, give_rate, schedule_settings
from bonetune.training.loader import Shares, streaming_loader, training_loader
from bonetune.training.plan import Plan
from bonetune.training.report import Progress, Recorder, Tally
from bonetune.training.signals import Termination
from bonetune.training.tasks import ABOUT

TALLY_FILE = "tally.json"


def make_trainer(planned: Plan, on_progress: Callable[[Progress], None] | None, ending: Termination) -> "BoneTrainer":
    """The loop of a planned run, with nothing written yet."""
    trainer = BoneTrainer(planned, training_arguments(planned), on_progress, ending)
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        _check_optimizer(trainer)
    return trainer


def _check_optimizer(trainer: "BoneTrainer") -> None:
    """Raise `InputError` if the optimizer or the schedule cannot be made, before anything is written."""
    config = trainer.planned.config
    setting, value = "optim", config.optim
    try:
        trainer.create_optimizer()
        setting, value = "lr_scheduler_type", config.lr_scheduler_type
        trainer.create_scheduler(trainer.planned.steps)
    except (AttributeError, ImportError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{setting} {value} cannot be used so: {' '.join(str(error).split())}") from error
    trainer.optimizer = trainer.lr_scheduler = None


def training_arguments(planned: Plan) -> TrainingArguments:
    """What transformers' loop is told. When it logs, evaluates and saves is decided here, step by step."""
    config = planned.config
    # named only where it is wanted: transformers warns that it will be called activation_checkpointing
    checkpointing: dict[str, Any] = {"gradient_checkpointing": True} if config.gradient_checkpointing else {}
    arguments = TrainingArguments(
        **checkpointing,
        output_dir=config.output_dir,
        learning_rate=planned.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        lr_scheduler_kwargs=schedule_settings(
            config.lr_scheduler_type, config.lr_scheduler_kwargs, planned.steps, config.warmup_steps
        )
        or None,
        warmup_steps=config.warmup_steps,
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        num_train_epochs=config.num_train_epochs,
        max_steps=planned.steps,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_epsilon=config.adam_epsilon,
        max_grad_norm=config.max_grad_norm,
        optim=config.optim,
        optim_args=config.optim_args,
        bf16=config.bf16,
        fp16=config.fp16,
        seed=config.seed,
        use_cpu=not torch.accelerator.is_available(),  # else several processes on a CPU would not find each other
        eval_strategy="epoch" if config.lr_scheduler_type in HEEDING_EVALUATIONS else "no",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        report_to=list(config.report_to) or "none",
        run_name=config.run_name,
        fsdp=config.fsdp,  # pyright: ignore[reportArgumentType]  (a flag, annotated as the list it was)
        fsdp_config=config.fsdp_config,
        deepspeed=config.deepspeed,
    )
    if arguments.world_size != planned.world:
        raise RunError(
            f"WORLD_SIZE is {planned.world}, and {arguments.world_size} processes found each other: start with torchrun or "
            "accelerate launch, or unset it."
        )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # nn.DataParallel would copy the model at each step
        warnings.warn("Of several GPUs one is used: start with `torchrun --nproc-per-node gpu` to use all.", stacklevel=2)
    return arguments


class BoneTrainer(Trainer):
    """Trainer whose steps are a `Plan`'s.

    The loss of an optimizer step is the sum over all its examples, on all devices, divided by what it counts as a whole.

    Attributes:
        stopped: whether the run was asked to end before its last step.
    """

    def __init__(
        self,
        planned: Plan,
        arguments: TrainingArguments,
        on_progress: Callable[[Progress], None] | None,
        ending: Termination,
    ) -> None:
        self.planned, self.ending, self.stopped = planned, ending, False
        self.folder = Path(planned.config.output_dir)
        self.recorder = Recorder(
            self.folder / METRICS_FILE, planned.steps, on_progress if arguments.process_index == 0 else None
        )
        self._losses: list[Tensor] = []
        self._padded_tokens = 0
        self._batch: Batch = {}
        self._step_examples: list[int] = []
        self._grad_norm = self._learning_rate = 0.0
        super().__init__(
            model=planned.model,
            args=arguments,
            train_dataset=planned.train,  # pyright: ignore[reportArgumentType]  (only asked for its length)
            eval_dataset=planned.evaluation,  # pyright: ignore[reportArgumentType]  (only asked whether it is there)
        )
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.remove_callback(PrinterCallback)
        self.add_callback(_Hooks(self))

    # batches

    def get_train_dataloader(self) -> Any:
        planned = self.planned
        shared = Shares(self.args.world_size, self.args.process_index, self.args.gradient_accumulation_steps)
        if planned.stream is None:
            return training_loader(planned.train, planned.supervised, planned.batches, shared, planned.collate)
        return streaming_loader(
            planned.stream,
            planned.task.supervised,
            batch_size=planned.batches.batch_size,
            window=planned.config.shuffle_buffer_size,
            seed=planned.config.seed,
            shared=shared,
            collate=planned.collate,
            group_by_length=planned.batches.group_by_length,
        )

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> int | None:
        self._losses, self._padded_tokens, self._step_examples = [], 0, []
        return batch_samples[0]["supervised"] if batch_samples else None

    # loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        self._batch = inputs
        self._step_examples += inputs["examples"]
        self._padded_tokens += inputs["input_ids"].numel()
        tensors = {name: value for name, value in inputs.items() if name not in ABOUT}
        loss = self.planned.task.loss(model, **tensors, supervised=max(num_items_in_batch, 1))
        if not torch.isfinite(loss):
            self._give_up(f"The loss is {loss.item()}", inputs["examples"])
        self._losses.append(loss.detach())
        return loss * self.args.world_size  # gradients are averaged over devices

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        norm: Any = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._grad_norm = float(norm)
        # with loss scaling, too large gradients are met by a smaller scale
        if not np.isfinite(self._grad_norm) and getattr(self.accelerator, "scaler", None) is None:
            self._give_up(f"The gradient's norm is {self._grad_norm}", self._step_examples)
        return self._grad_norm

    def _give_up(self, what: str, examples: list[int]) -> None:
        step = self.state.global_step + 1
        file = self.folder / (f"rank{self.args.process_index}-" * (self.args.world_size > 1) + BAD_BATCH_FILE)
        write_json(file, {"step": step, "reason": what, "examples": self.planned.describe_examples(examples)})
        raise DivergedError(
            f"{what} at step {step}: the run has fallen apart. Its examples are in {file}. Lower learning_rate, or look at "
            "them; the last checkpoint in output_dir is from before."
        )

    # optimizer

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """transformers' optimizer; LoRA+'s has rates of its own, and so have heads with a `head_learning_rate`."""
        config = self.planned.config
        if self.optimizer is not None:
            return self.optimizer
        if config.baseline == "lora+":
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)  # pyright: ignore[reportArgumentType]
            self.optimizer = baselines.optimizer(config, self.model, kind, options)
        optimizer = super().create_optimizer(model)
        if config.head_learning_rate is not None:
            heads = [p for name, p in self.planned.model.named_parameters() if WHOLE_MODULE in name and p.requires_grad]
            give_rate(optimizer, heads, config.head_learning_rate)
        return optimizer

    # evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss over what is supervised in the evaluation set, and the task's metrics; a line of metrics.jsonl."""
        model: Any = self.model_wrapped if self.is_fsdp_enabled else self.model
        was_training = model.training
        model.eval()
        device = self.args.device
        mine = self.planned.evaluation_batches(self.args.world_size, self.args.process_index)
        with self.compute_loss_context_manager():
            measured = self.planned.task.evaluate(model, (self._prepare_inputs(batch) for batch in mine))
        model.train(was_training)
        total, count, logits, labels = self._gathered(measured, device)
        values = {"loss": total / count}
        if self.planned.task.metrics is not None:
            values |= self.planned.task.metrics(logits, labels)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        if self.is_world_process_zero():
            self.recorder.write({"step": self.state.global_step, "epoch": self.state.epoch or 0.0, **metrics})
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _gathered(self, measured: tuple[Any, ...], device: torch.device) -> tuple[Any, ...]:
        if self.args.world_size == 1:
            return measured
        from accelerate.utils import gather_object

        parts = gather_object([measured])
        totals, counts, logits, labels = zip(*parts, strict=True)
        kept = [(a, b) for a, b in zip(logits, labels, strict=True) if a is not None]
        joined = [torch.cat(tensors) for tensors in zip(*kept, strict=True)] if kept else [None, None]
        return sum(totals), sum(counts), *joined

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Hand numbers to other places of report; they are not kept in the checkpoints' state, which would grow with them."""
        super().log(logs, start_time)
        self.state.log_history.clear()

    # each step

    def after_step(self) -> None:
        """Count the step; decide whether to log, evaluate, save, or stop."""
        state, config = self.state, self.planned.config
        totals = [sum(loss.item() for loss in self._losses), self._padded_tokens, float(self.ending.requested)]
        if self.args.world_size > 1:
            summed: Any = self.accelerator.reduce(torch.tensor(totals, dtype=torch.float64, device=self.args.device))
            totals = summed.tolist()
        self.recorder.count(totals[0], self._batch["tokens"], int(totals[1]))
        last = state.global_step >= self.planned.steps
        self.stopped = bool(totals[2]) and not last
        whole_epochs = self.planned.stream is None and state.global_step % self.planned.batches.steps == 0
        evaluates = self.planned.evaluation is not None
        due = state.global_step % config.eval_steps == 0 if config.eval_steps else whole_epochs
        if state.global_step % config.logging_steps == 0 or last:
            self._log_step()
        # a run that was asked to end has no time for it
        self.control.should_evaluate = evaluates and (due or last) and not self.stopped
        self.control.should_save = state.global_step % config.save_steps == 0 or last or self.stopped
        self.control.should_training_stop = self.control.should_training_stop or self.stopped

    def before_update(self) -> None:
        """Note the rate with which the step is about to be made."""
        self._learning_rate = self._get_learning_rate()

    def _log_step(self) -> None:
        step, epoch = self.state.global_step, self.state.epoch or 0.0
        measured = {"grad_norm": self._grad_norm, "learning_rate": self._learning_rate}
        if self.is_world_process_zero():
            self.log(
                {
                    name: value
                    for name, value in self.recorder.log(step, epoch, **measured).items()
                    if name not in ("step", "epoch")
                }
            )
        else:
            self.recorder.tally.losses = []

    # the beginning

    def begin(self) -> None:
        """Count on from a checkpoint; or rehearse what could go wrong later: the largest batch, an evaluation, a checkpoint."""
        checkpoint = self.planned.checkpoint
        tally = _tally_of(checkpoint) if checkpoint else None
        if self.is_world_process_zero():
            self.recorder.begin(self.state.global_step, tally)
        else:
            self.recorder.tally = tally or Tally()
        if checkpoint is None and self.planned.config.rehearsal:
            self._rehearse()
            self.recorder.start_clock()

    def _rehearse(self) -> None:
        with _same_random_numbers():
            model: Any = self.model_wrapped
            batch = self.planned.worst_batch()
            self.training_step(model, batch, batch["supervised"])
            model.zero_grad()
            self._losses, self._step_examples, self._padded_tokens = [], [], 0
        if self.planned.evaluation is not None:
            self.evaluate()
        self._save_checkpoint(self.model_wrapped, None)
        if self.is_world_process_zero():
            # Adam's two averages come with the first step
            bytes_each = checkpoints.size_of(checkpoints.checkpoints(self.folder)[-1]) + 8 * self.planned.trainable_parameters
            needed = (self.planned.config.save_total_limit + 1) * bytes_each
            checkpoints.check_space(self.folder, needed, "its checkpoints")

    # checkpoints

    def restore(self, checkpoint: Path) -> None:
        """Take over a checkpoint without going on from it."""
        self._load_from_checkpoint(str(checkpoint))
        self.recorder.tally = _tally_of(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        schedule: Any = self.lr_scheduler
        if checkpoint is None or not hasattr(schedule, "lr_lambdas"):
            return
        # the saved rate is that of the schedule the run was started with, which may have been shorter
        rates = [base * rate(schedule.last_epoch) for base, rate in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        schedule._last_lr = rates

    def gathered_adapter(self) -> dict[str, Any] | None:
        """The model's whole state where the weights are spread over the devices (on the first one), else None."""
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return None
        return self.accelerator.get_state_dict(self.model_wrapped)

    def _get_output_dir(self, trial: Any) -> str:
        return str(checkpoints.staging(self.folder))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """What transformers writes, put together beside, with checksums, and renamed."""
        staging, main = checkpoints.staging(self.folder), self.is_world_process_zero()
        if main:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if main:
                staged = staging / f"{checkpoints.PREFIX}{self.state.global_step}"
                for unneeded in ("training_args.bin", "README.md"):
                    (staged / unneeded).unlink(missing_ok=True)
                write_json(staged / TALLY_FILE, asdict(self.recorder.tally))
                write_json(
                    staged / checkpoints.DATA_FILE, self.planned.fingerprint | {"init_seconds": self.planned.init_seconds}
                )
                checkpoints.publish(staged, self.folder)
                checkpoints.rotate(self.folder, self.planned.config.save_total_limit)
        except (OSError, RuntimeError, SafetensorError) as error:
            if not _of_the_disk(error):
                raise
            free = shutil.disk_usage(self.folder).free / 1e9
            raise RunError(
                f"The checkpoint of step {self.state.global_step} could not be written to {self.folder} ({free:.2f} GB free): "
                f"{error}. Earlier checkpoints are untouched: make room and go on with --resume."
            ) from error
        finally:
            if main:
                shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()


def _tally_of(checkpoint: Path) -> Tally:
    return Tally(**json.loads((checkpoint / TALLY_FILE).read_text(encoding="utf-8")))


def _of_the_disk(error: Exception) -> bool:
    """Whether writing failed, and not the code that writes: torch's writer says so in words only."""
    return not isinstance(error, RuntimeError) or any(
        word in str(error) for word in ("PytorchStreamWriter", "file_writer", "pos")
    )


class _Hooks(TrainerCallback):
    """Where transformers' loop calls ours."""

    def __init__(self, trainer: BoneTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.begin()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.before_update()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_evaluate = False  # it was done after the epoch's last step, before that step's checkpoint

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.after_step()


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """What is drawn inside the block is drawn again after it."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])
