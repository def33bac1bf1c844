"""What the verbs share of the terminal: a console on standard error, a progress bar, quiet libraries."""

import logging
import os
import warnings
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

# of several processes, the first one speaks
_QUIET = os.environ.get("RANK", "0") != "0"
# no markup: texts of users and paths may hold brackets; no wrapping: programs and logs read lines
console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True, quiet=_QUIET)
out = Console(highlight=False, markup=False, soft_wrap=True, quiet=_QUIET)


def quiet_libraries() -> None:
    """Keep other libraries' bars and advice off the terminal. Their errors, and this package's warnings, stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("bonetune").setLevel(logging.INFO)
    for module in ("transformers", "torch", "peft", "accelerate"):
        warnings.filterwarnings("ignore", module=rf"{module}(\..*)?")
    warnings.showwarning = lambda message, *args, **kwargs: console.print(f"warning: {message}", style="yellow")


def progress() -> Progress:
    """A bar with a free text (loss, rate, time left) at its end."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


def training_note(state: Any) -> str:
    """Loss, tokens a second (with padding, if there is any), memory, time left, from a `bonetune.training.report.Progress`."""
    minutes, seconds = divmod(round(state.seconds_left), 60)
    useful, all_tokens = round(state.tokens_per_second), round(state.padded_tokens_per_second)
    rate = f"{useful} tokens/s" if useful == all_tokens else f"{useful} tokens/s ({all_tokens} padded)"
    memory = state.memory_bytes / 2**30
    return f"loss {state.loss:.3f}  {rate}  {memory:.1f} GiB  {minutes}:{seconds:02d} left"
