"""transformers' Trainer with our batches and loss."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainingArguments

from bonetune.data import collate
from bonetune.data.encoding import IGNORED
from bonetune.errors import RunError
from bonetune.losses import completion_loss
from bonetune.training.folder import METRICS_FILE
from bonetune.training.plan import Plan
from bonetune.training.report import Progress, Recorder


def make_trainer(planned: Plan, on_progress: Callable[[Progress], None] | None) -> Trainer:
    """The loop of a planned run, with nothing written yet."""
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
        eval_dataset=planned.evaluation,  # pyright: ignore[reportArgumentType]  (as above)
        data_collator=collate(planned.loaded.tokenizer.pad_token_id),  # pyright: ignore[reportArgumentType]  (takes our examples)
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Recorder(Path(config.output_dir) / METRICS_FILE, lambda: trainer.tokens_seen, on_progress))
    return trainer


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
