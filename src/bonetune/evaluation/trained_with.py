"""How the rows that made an adapter were read, as its run noted it."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bonetune.data import PAPER_PROMPT
from bonetune.data.formats import Kind, RowFormat, TaskName
from bonetune.errors import InputError
from bonetune.files import SUMMARY_FILE, read_run
from bonetune.models import Loaded

# A question is an instruction without input, whether or not the template has a place for one.
QUESTION_FIELDS = ("instruction", "input", "output")


@dataclass(frozen=True)
class TrainedWith:
    """What a run left beside its adapter; nothing where there is no run.

    Args:
        settings: its run.yaml.
        kind: how its rows were read: as its summary.json tells, else as its settings do; `auto` if neither knows.
        fields: the rows' fields, in `RowFormat`'s order; None: not known.
        conversational: whether the chat template made the prompts of prompt-completion rows.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    kind: Kind | Literal["auto"] = "auto"
    fields: tuple[str, ...] | None = None
    conversational: bool = False

    @classmethod
    def of(cls, folder: str | None) -> "TrainedWith":
        """What lies in an adapter's folder."""
        if folder is None:
            return cls()
        settings = read_run(Path(folder))
        summary = Path(folder) / SUMMARY_FILE
        noted = json.loads(summary.read_text(encoding="utf-8")).get("row_format") if summary.is_file() else None
        if noted is None:
            noted = {"kind": settings.get("dataset_format", "auto"), "fields": settings.get("dataset_field")}
        fields = noted.get("fields")
        return cls(settings, noted["kind"], tuple(fields) if fields else None, bool(noted.get("conversational")))

    def row_format(self, row: dict[str, Any], template: str, task_type: TaskName) -> RowFormat:
        """The run's format if the row fits it, else what the row itself tells.

        Raises `InputError` if the row tells nothing.
        """
        told: dict[str, Any] = {"template": template, "task_type": task_type}
        try:
            return RowFormat.detect(row, self.fields, kind=self.kind, **told)
        except InputError:  # other data than the run's
            return RowFormat.detect(row, **told)


def question_template(loaded: Loaded) -> str | None:
    """The template that questions to a model are put into; None where the tokenizer's chat template does it."""
    run = TrainedWith.of(loaded.adapter)
    if run.kind == "prompt-completion" and not run.conversational:
        return "{instruction}"
    # an adapter trained on instructions has learned its run's prompt, not the chat template
    instructed = run.kind in ("instruction", "alpaca") or (run.kind == "auto" and len(run.fields or ()) == 2)
    if loaded.tokenizer.chat_template and not instructed:
        return None
    return run.settings.get("prompt_template") or PAPER_PROMPT
