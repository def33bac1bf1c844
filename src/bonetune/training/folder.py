"""The folder of a run: what lies in it, whom it belongs to, from which checkpoint a run goes on."""

import shutil
import warnings
from pathlib import Path

import yaml

from bonetune.errors import InputError
from bonetune.files import CERTIFICATE_FILE, PROMPTS_FILE, RUN_FILE, SUMMARY_FILE, usable_folder
from bonetune.rwkv.tokenizer import VOCABULARY_FILE as WORLD_VOCABULARY
from bonetune.training.baselines import INITIAL_FOLDER
from bonetune.training.checkpoints import checkpoints, last_good
from bonetune.training.checkpoints import sweep as sweep_checkpoints
from bonetune.training.config import RunConfig, load_config

METRICS_FILE, PLOT_FILE, REPORT_FILE, CARD_FILE = "metrics.jsonl", "loss.png", "report.html", "README.md"
SAMPLES_FILE, ENVIRONMENT_FILE, BAD_BATCH_FILE = "samples.jsonl", "environment.json", "bad_batch.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# What is written after the last step, the card last of all.
CLOSING_FILES = (*ADAPTER_FILES, SUMMARY_FILE, PLOT_FILE, REPORT_FILE, CERTIFICATE_FILE, CARD_FILE)
# Of the baseline `full`, in the adapter's place; and more if the weights are in several files.
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json")
_WEIGHTS = "model*.safetensors"
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    WORLD_VOCABULARY,
)
# What may differ when a run goes on: how long it goes, what it reports and keeps, where it lies, how it computes the same.
MAY_CHANGE_ON_RESUME = {
    *("max_steps", "num_train_epochs", "logging_steps", "save_steps", "save_total_limit", "output_dir"),
    *("eval_dataset_name", "eval_dataset_split", "eval_steps", "per_device_eval_batch_size"),
    *("report_to", "run_name", "rehearsal", "sample_prompts", "sample_tokens", "cache_tokens"),
    # examples of a step are a matter of their product with the number of devices, which is checked
    *("per_device_train_batch_size", "gradient_accumulation_steps"),
}


def claim(config: RunConfig, *, resume: bool, overwrite: bool) -> Path | None:
    """The checkpoint to go on from, if any. Raises if the folder holds a run and the user has not said what to do with it."""
    folder = Path(config.output_dir)
    usable_folder(folder, "output_dir")
    if resume and overwrite:
        raise InputError("--resume goes on with the run in output_dir, --overwrite throws it away: pass one of them.")
    if resume:
        checkpoint, passed_over = last_good(folder)
        for sentence in passed_over:
            warnings.warn(sentence, stacklevel=2)
        if checkpoint is None:
            raise InputError(f"output_dir {folder} holds no {'whole ' if passed_over else ''}checkpoint to resume from.")
        _check_same_run(folder / RUN_FILE, config)
        return checkpoint
    if _left_by_a_run(folder) and not overwrite:
        raise InputError(f"output_dir {folder} already holds a run: pass --overwrite or --resume, or choose another.")
    if config.baseline == "full" and not _trained_whole(folder) and any((folder / name).exists() for name in MODEL_FILES):
        raise InputError(f"output_dir {folder} holds a model, which baseline full would write over: choose another.")
    return None


def trained_files(folder: Path) -> list[Path]:
    """The files in which the weights lie that a run has trained."""
    return sorted(folder.glob(_WEIGHTS)) if _trained_whole(folder) else [folder / ADAPTER_FILES[1]]


def finished(folder: Path) -> bool:
    """Whether the run in `folder` has written all that it writes after its last step."""
    if _trained_whole(folder):
        trained = (folder / "config.json").exists() and any(folder.glob(_WEIGHTS))
    else:
        trained = all((folder / name).exists() for name in ADAPTER_FILES)
    return trained and all((folder / name).exists() for name in (SUMMARY_FILE, CARD_FILE))


def reopen(folder: Path) -> None:
    """Take away what tells of an end that the run, going on, no longer has; it comes again with the new one."""
    sweep(folder)
    for path in (*(folder / name for name in CLOSING_FILES), *_whole_model(folder)):
        path.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what a process that was killed, or gave up, left half-done."""
    sweep_checkpoints(folder)
    for staged in folder.glob(f".{folder.name}-*"):
        shutil.rmtree(staged, ignore_errors=True)
    for file in (folder / BAD_BATCH_FILE, *folder.glob(f"rank*-{BAD_BATCH_FILE}")):
        file.unlink(missing_ok=True)


def clear(folder: Path) -> None:
    """Take away what an earlier run left; other files stay."""
    sweep(folder)
    for path in _left_by_a_run(folder):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _left_by_a_run(folder: Path) -> list[Path]:
    names = {RUN_FILE, METRICS_FILE, PROMPTS_FILE, SAMPLES_FILE, ENVIRONMENT_FILE, BAD_BATCH_FILE, *CLOSING_FILES} - {CARD_FILE}
    names |= {INITIAL_FOLDER}
    found = [folder / name for name in sorted(names) if (folder / name).exists()] + checkpoints(folder) + _whole_model(folder)
    if found:  # alone, a README or a tokenizer is somebody else's
        found += [folder / name for name in (CARD_FILE, *_TOKENIZER_FILES) if (folder / name).exists()]
    return found


def _trained_whole(folder: Path) -> bool:
    """Whether the run in `folder` trains all parameters: elsewhere, a model's files are somebody else's."""
    try:
        settings = yaml.safe_load((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(settings, dict) and settings.get("baseline") == "full"


def _whole_model(folder: Path) -> list[Path]:
    """The files of the model that a run of `full` has written."""
    if not _trained_whole(folder):
        return []
    return sorted({path for name in (*MODEL_FILES, _WEIGHTS) for path in folder.glob(name)})


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
