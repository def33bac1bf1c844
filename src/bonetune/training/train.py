"""`bonetune train`."""

import errno
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bonetune.diagnostics import environment, git_state
from bonetune.errors import DivergedError, RunError, Terminated
from bonetune.files import (
    PROMPTS_FILE,
    RUN_FILE,
    SUMMARY_FILE,
    folder_written_beside,
    read_json_lines,
    write_json,
    write_json_lines,
    write_text,
)
from bonetune.formats.checkpoint import fingerprint_of
from bonetune.models import compiled_layers, generate
from bonetune.training import baselines
from bonetune.training.checkpoints import step_of
from bonetune.training.config import RunConfig
from bonetune.training.folder import (
    ENVIRONMENT_FILE,
    METRICS_FILE,
    PLOT_FILE,
    SAMPLES_FILE,
    clear,
    reopen,
)
from bonetune.training.model_card import write_card
from bonetune.training.plan import Plan, plan
from bonetune.training.plots import plot_loss
from bonetune.training.report import Progress, read_metrics
from bonetune.training.report_page import write_report
from bonetune.training.signals import termination
from bonetune.training.trainer import BoneTrainer, make_trainer


@dataclass(frozen=True)
class TrainResult:
    """What a run left: the adapter (of the baseline `full`, the model) in `output_dir`, and its numbers."""

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
    """Fine-tune a model with an adapter of the Bone family; or, for comparisons, by another method (`baseline`).

    On one device or, under `torchrun` or `accelerate launch`, on several. Before the first step the largest batch, an
    evaluation and a checkpoint are rehearsed. A SIGTERM ends the run after the step it is in, with a checkpoint.

    Args:
        config: settings, or the YAML or TOML file that holds them.
        overrides: settings that win over the file's.
        resume: go on from the last whole checkpoint in `output_dir`, bit for bit as the run would have gone on.
        overwrite: replace what a run left in `output_dir`.
        on_plan: called once with the checked run, before the first step.
        on_progress: called at each logged step.

    Raises:
        InputError: settings, data or model that cannot be used; nothing is written then.
        RunError: the loss or the gradient is no longer a finite number, or the disk is full.
        Terminated: a SIGTERM came before the last step.

    Example:
        >>> result = bonetune.train("run.yaml", {"r": 32}, on_progress=print)
        >>> result.last_loss
    """
    planned = plan(config, overrides, resume=resume, overwrite=overwrite)
    folder = Path(planned.config.output_dir)
    with termination() as ending, planned.attention(), warnings.catch_warnings():
        # PEFT looks for a configuration beside the weights, and a file of RWKV's has none
        warnings.filterwarnings("ignore", r"Could not find a config file in .*\.pth", UserWarning)
        trainer = make_trainer(planned, on_progress, ending)
        if trainer.is_world_process_zero():
            if on_plan is not None:
                on_plan(planned)
            _open_folder(planned, folder)
        trainer.accelerator.wait_for_everyone()
        with _disk_heeded(folder):
            _steps(trainer, planned)
        if trainer.stopped:
            step = trainer.state.global_step
            raise Terminated(f"Ended by SIGTERM after step {step} of {planned.steps}; go on with --resume.")
        _check_finite(planned.model)
        adapter = trainer.gathered_adapter()
        if trainer.is_world_process_zero():
            with _disk_heeded(folder):
                _close_folder(trainer, planned, adapter, folder)
        trainer.accelerator.wait_for_everyone()
    return _result(trainer, planned, folder)


@contextmanager
def _disk_heeded(folder: Path) -> Iterator[None]:
    """A full disk is told of in one sentence, wherever it is met."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise RunError(f"{folder} cannot be written to ({error.strerror}): make room and go on with --resume.") from error


def _open_folder(planned: Plan, folder: Path) -> None:
    """What is written before the first step."""
    if planned.checkpoint is None:
        clear(folder)
        baselines.save_initial(planned.config, planned.model, folder)
        write_json_lines(folder / SAMPLES_FILE, _answered(planned, "before"))
    else:
        reopen(folder)
    write_text(folder / RUN_FILE, planned.config.to_yaml())
    facts = {"environment": environment(), "git": git_state(Path.cwd()), "command": sys.argv}
    write_json(folder / ENVIRONMENT_FILE, facts)


def _answered(planned: Plan, when: str) -> list[dict[str, str]]:
    """The first prompts with what the model answers to them now."""
    chosen = planned.prompts[: planned.config.sample_prompts] if planned.config.task_type != "SEQ_CLS" else []
    if not chosen:
        return []
    model, tokenizer = planned.model, planned.loaded.tokenizer
    questions, longest = [prompt for prompt, _ in chosen], planned.config.sample_tokens
    texts = generate(model, tokenizer, questions, max_new_tokens=longest, opened=planned.opened)
    return [{"prompt": p, "expected": e, when: text} for (p, e), text in zip(chosen, texts, strict=True)]


def _steps(trainer: BoneTrainer, planned: Plan) -> None:
    """All steps that are left."""
    checkpoint = planned.checkpoint
    if checkpoint is not None and step_of(checkpoint) >= planned.steps:
        # all were made, and the process ended before the adapter was written
        trainer.restore(checkpoint)
    else:
        with compiled_layers(planned.model, planned.config.torch_compile):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def _close_folder(trainer: BoneTrainer, planned: Plan, adapter: dict[str, Any] | None, folder: Path) -> None:
    """What is written after the last step: the adapter first, then what tells of it."""
    with folder_written_beside(folder) as beside:
        if planned.config.baseline is None:
            planned.model.save_pretrained(beside, state_dict=adapter)
        else:
            baselines.save(planned.config, planned.model, beside, folder)
        planned.loaded.tokenizer.save_pretrained(beside)
        write_json_lines(beside / PROMPTS_FILE, [prompt for prompt, _ in planned.prompts])
        closing = {"seconds": trainer.recorder.tally.seconds, "base_fingerprint": fingerprint_of(planned.loaded.base)}
        write_json(beside / SUMMARY_FILE, planned.summary() | closing)
    if adapter is None:  # else the weights are spread over the devices
        file = folder / SAMPLES_FILE
        before = read_json_lines(file) if file.is_file() else []
        of_prompts = {sample["prompt"]: sample for sample in before}
        after = _answered(planned, "after")
        write_json_lines(file, [of_prompts.get(sample["prompt"], {}) | sample for sample in after])
    metrics = read_metrics(folder / METRICS_FILE)
    config = planned.config
    title = f"{config.method_in_words}, on {Path(planned.loaded.base).name}"
    unit = {"unit": None} if config.task_type == "SEQ_CLS" else {}
    plot_loss(metrics, folder / PLOT_FILE, title, **unit)
    write_report(folder)
    write_card(folder)


def _result(trainer: BoneTrainer, planned: Plan, folder: Path) -> TrainResult:
    losses = [line["loss"] for line in read_metrics(folder / METRICS_FILE) if "loss" in line]
    return TrainResult(
        output_dir=planned.config.output_dir,
        steps=planned.steps,
        trainable_parameters=planned.trainable_parameters,
        first_loss=losses[0],
        last_loss=losses[-1],
        seconds=trainer.recorder.tally.seconds,
        notes=planned.notes,
    )


def _check_finite(model: Any) -> None:
    bad = [name for name, parameter in model.named_parameters() if parameter.requires_grad and not parameter.isfinite().all()]
    if bad:
        raise DivergedError(
            f"Training left values that are not finite in {bad[0]} and {len(bad) - 1} more. Lower learning_rate."
        )
