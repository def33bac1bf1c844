"""The folder of a run: what lies in it, whom it belongs to, from which checkpoint a run goes on."""

import shutil
from pathlib import Path

from bonetune.errors import InputError
from bonetune.files import PROMPTS_FILE, RUN_FILE, usable_folder
from bonetune.training.config import RunConfig, load_config

METRICS_FILE, PLOT_FILE = "metrics.jsonl", "loss.png"
# What may differ when a run goes on: how long it goes, what it reports and keeps, where it lies.
MAY_CHANGE_ON_RESUME = {
    *("max_steps", "num_train_epochs", "logging_steps", "save_steps", "save_total_limit", "output_dir"),
    *("eval_dataset_name", "eval_dataset_split", "eval_steps"),
}


def claim(config: RunConfig, *, resume: bool, overwrite: bool) -> Path | None:
    """The checkpoint to go on from, if any. Raises if the folder holds a run and the user has not said what to do with it."""
    folder = Path(config.output_dir)
    usable_folder(folder, "output_dir")
    if resume and overwrite:
        raise InputError("--resume goes on with the run in output_dir, --overwrite throws it away: pass one of them.")
    if resume:
        checkpoints = sorted(filter(_is_whole, folder.glob("checkpoint-*")), key=step_of)
        if not checkpoints:
            raise InputError(f"output_dir {folder} holds no checkpoint to resume from.")
        _check_same_run(folder / RUN_FILE, config)
        return checkpoints[-1]
    if _left_by_a_run(folder) and not overwrite:
        raise InputError(f"output_dir {folder} already holds a run: pass --overwrite or --resume, or choose another.")
    return None


def clear(folder: Path) -> None:
    """Take away what an earlier run left; other files stay."""
    for path in _left_by_a_run(folder):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def step_of(checkpoint: Path) -> int:
    """The optimizer step at which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def _left_by_a_run(folder: Path) -> list[Path]:
    names = (RUN_FILE, METRICS_FILE, PROMPTS_FILE, PLOT_FILE, "adapter_config.json", "adapter_model.safetensors")
    return [*(folder / name for name in names if (folder / name).exists()), *folder.glob("checkpoint-*")]


def _is_whole(checkpoint: Path) -> bool:
    files = ("trainer_state.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt")
    return checkpoint.name.rpartition("-")[2].isdigit() and all((checkpoint / name).is_file() for name in files)


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
