"""What a measurement was made with: versions, processor, commit, allocator, date."""

import datetime
import platform
import subprocess
from pathlib import Path
from typing import Any

from bonetune.diagnostics import environment
from bonetune_cli import allocator

CPUINFO = Path("/proc/cpuinfo")


def record() -> dict[str, Any]:
    """For JSON: `bonetune.diagnostics.environment` and what a benchmark needs besides."""
    return environment() | {
        "processor_model": _processor_model(),
        "commit": commit(),
        "dirty": bool(_git("status", "--porcelain")),
        "allocator": allocator.current() or "default",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def commit() -> str:
    """The checkout's commit, short; empty outside a checkout."""
    return _git("rev-parse", "--short", "HEAD")


def line(facts: dict[str, Any]) -> str:
    """The same for people, in one line."""
    commit = f"{facts['commit'] or 'unknown'}{' with changes' if facts['dirty'] else ''}"
    settings = facts["allocator"]
    malloc = settings if isinstance(settings, str) else " ".join(f"{name}={value}" for name, value in settings.items())
    return (
        f"torch {facts['torch']}, peft {facts['peft']}, transformers {facts['transformers']}; {facts['processor_model']} "
        f"({facts['processor']}), {facts['threads']} threads; allocator: {malloc}; commit {commit}, {facts['date'][:10]}."
    )


def _processor_model() -> str:
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    here = Path(__file__).parent
    return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=False).stdout.strip()
