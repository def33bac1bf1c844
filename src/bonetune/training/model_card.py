"""README.md of an adapter, or of a model that was trained whole: the model card that hubs and people read."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import jinja2
import yaml

from bonetune.data.reading import SUFFIXES
from bonetune.files import write_text
from bonetune.rwkv.weights import is_pth
from bonetune.training.baselines import CHANGING_THE_BASE
from bonetune.training.facts import Fact, facts, loss_unit, results
from bonetune.training.folder import CARD_FILE
from bonetune.training.run_record import RunRecord, read_record

# By task: PEFT's class that loads base model and adapter, and the hub's name of what the model does.
_TASKS = {
    "CAUSAL_LM": ("AutoPeftModelForCausalLM", "text-generation"),
    "SEQ_CLS": ("AutoPeftModelForSequenceClassification", "text-classification"),
    "SEQ_2_SEQ_LM": ("AutoPeftModelForSeq2SeqLM", None),
}
# What a baseline trains by, beside `full`.
_METHODS = {
    "lora": "PEFT's LoRA",
    "rslora": "PEFT's rank-stabilized LoRA",
    "lora+": "PEFT's LoRA with LoRA+'s optimizer",
    "dora": "PEFT's DoRA",
    "pissa": "PEFT's PiSSA",
    "olora": "PEFT's OLoRA",
    "lora-ga": "PEFT's LoRA-GA",
    "milora": "PEFT's LoRA, from MiLoRA's beginning",
    "miss": "PEFT's MiSS",
    "miss-bat": "PEFT's MiSS (bat)",
}
# Where a run's own prompt is put around what the model is asked.
_INSTRUCTIONS = ("instruction", "alpaca")


def write_card(folder: Path) -> Path:
    """Write README.md beside what was trained, and return its path; what PEFT wrote there is replaced.

    The front matter names the base model and the data where they are ids on the hub, not where they are local files: the hub
    refuses a card that names a base model it does not have. The license is left to whoever publishes.

    Args:
        folder: a run's output_dir, with run.yaml and metrics.jsonl at least.

    Raises:
        InputError: `folder` holds no run, or a file that does not hold what it should.
    """
    record = read_record(folder)
    loader, _ = _TASKS.get(record.settings.get("task_type", "CAUSAL_LM"), _TASKS["CAUSAL_LM"])
    is_model = record.baseline == "full"
    outcome = results(record)
    text = _template().render(
        front_matter=yaml.safe_dump(_front_matter(record), sort_keys=False, allow_unicode=True),
        name=folder.resolve().name,
        base=record.outline.get("base"),
        variant=record.outline.get("variant", "bone"),
        baseline=record.baseline and _METHODS.get(record.baseline, record.baseline),
        is_model=is_model,
        is_converted=record.baseline in CHANGING_THE_BASE,
        training=[fact for fact in facts(record) if fact not in outcome],
        results=outcome,
        loss_unit=loss_unit(record),
        certificate=_certificate(record.certificate),
        chosen=[(f"`{setting.name}`", setting.text) for setting in record.chosen() if setting.name != "output_dir"],
        prompt_template=_prompt_template(record.settings),
        loader=loader.replace("Peft", "") if is_model else loader,
        is_rwkv=is_pth(str(record.outline.get("base"))),
        initial_state="state" in (record.settings.get("train_parts") or ()),
        mergeable=loader == "AutoPeftModelForCausalLM",
        versions=_versions(record.environment),
    )
    write_text(folder / CARD_FILE, text.encode(errors="replace").decode())
    return folder / CARD_FILE


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bonetune.training"),
        autoescape=False,  # noqa: S701  (Markdown; `cell` keeps a table's cells apart)
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"cell": _cell, "fenced": _fenced, "python": json.dumps, "shell": shlex.quote}
    return environment.get_template("card.md")


def _front_matter(record: RunRecord) -> dict[str, Any]:
    base, datasets = record.outline.get("base"), [name for name in record.datasets if _on_the_hub(name)]
    _, pipeline = _TASKS.get(record.settings.get("task_type", "CAUSAL_LM"), (None, None))
    tags = (
        ["bonetune", record.baseline] if record.baseline else ["bone", "bonetune", str(record.outline.get("variant", "bone"))]
    )
    known = {
        "base_model": base if isinstance(base, str) and _on_the_hub(base) else None,
        "library_name": "transformers" if record.baseline == "full" else "peft",
        "pipeline_tag": pipeline,
        "tags": list(dict.fromkeys(tags)),
        "datasets": datasets or None,
    }
    return {name: value for name, value in known.items() if value is not None}


def _on_the_hub(name: str) -> bool:
    """Whether a name can be an id on the hub, and is not that of something here."""
    an_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name) is not None
    is_here = Path(name).exists() or Path(f"{name}.idx").exists()
    return an_id and not is_here and Path(name).suffix not in (*SUFFIXES, ".pth", ".bin", ".idx")


def _prompt_template(settings: dict[str, Any]) -> str | None:
    asked = settings.get("dataset_format") in _INSTRUCTIONS or len(settings.get("dataset_field") or ()) == 2
    return settings.get("prompt_template") if asked and settings.get("task_type", "CAUSAL_LM") != "SEQ_CLS" else None


def _certificate(certificate: dict[str, Any]) -> str | None:
    if not certificate.get("holds"):
        return None
    if certificate.get("method") == "layers":
        return (
            f"Each weight of the merged model ({certificate.get('dtype')}) was compared with what training computes for its "
            "layer, on random inputs, and is equal up to rounding."
        )
    agreement = certificate.get("greedy_agreement")
    greedy = f" {100 * agreement:.1f}% of its greedy choices are the adapted model's." if agreement is not None else ""
    return (
        f"The merged model ({certificate.get('dtype')}) was compared with the adapted one and is equal up to rounding.{greedy}"
    )


def _versions(environment: dict[str, Any]) -> list[Fact]:
    known = environment.get("environment") or {}
    names = ("bonetune", "peft", "transformers", "torch", "datasets", "python")
    return [(name, str(known[name])) for name in names if known.get(name)]


def _cell(text: str) -> str:
    """A text in one cell of a table, as it is: no character of it means anything to Markdown."""
    return re.sub(r"([\\`*_\[\]<>|~#])", r"\\\1", " ".join(text.split()))


def _fenced(text: str) -> str:
    """A block of code that no run of backticks in the text ends."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
