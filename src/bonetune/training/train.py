"""`bonetune train`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bonetune.errors import RunError
from bonetune.files import PROMPTS_FILE, RUN_FILE, folder_written_beside, write_json_lines, write_text
from bonetune.training.config import RunConfig
from bonetune.training.folder import METRICS_FILE, PLOT_FILE, clear
from bonetune.training.plan import Plan, plan
from bonetune.training.report import Progress, plot_loss, read_metrics
from bonetune.training.trainer import make_trainer


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

    Example:
        >>> result = bonetune.train("run.yaml", {"r": 32}, on_progress=print)
        >>> result.last_loss
    """
    planned = plan(config, overrides, resume=resume, overwrite=overwrite)
    config, folder = planned.config, Path(planned.config.output_dir)
    trainer = make_trainer(planned, on_progress)
    if on_plan is not None:
        on_plan(planned)
    if planned.checkpoint is None:
        clear(folder)
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


def _check_finite(model: Any) -> None:
    bad = [name for name, parameter in model.named_parameters() if parameter.requires_grad and not parameter.isfinite().all()]
    if bad:
        raise RunError(f"Training left values that are not finite in {bad[0]} and {len(bad) - 1} more. Lower learning_rate.")
