"""What a run left in its folder, as the report and the model card read it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined, to_jsonable_python

from bonetune.errors import InputError
from bonetune.files import CERTIFICATE_FILE, RUN_FILE, SUMMARY_FILE, read_json_lines
from bonetune.training.baselines import ADAPTERS_OWN, FAMILYS_OWN
from bonetune.training.config import RunConfig
from bonetune.training.folder import ENVIRONMENT_FILE, METRICS_FILE, SAMPLES_FILE
from bonetune.training.plots import Points, evaluated, is_number, points


@dataclass(frozen=True)
class Setting:
    """A setting of the run, what it means, and what it is if nothing is said (`required` where there is no such value)."""

    name: str
    value: Any
    default: Any
    description: str
    required: bool

    @property
    def differs(self) -> bool:
        """Whether someone has chosen this value."""
        return self.required or self.value != self.default

    @property
    def text(self) -> str:
        """The value as run.yaml may have it."""
        return _yaml(self.value)

    @property
    def default_text(self) -> str:
        """The default as run.yaml may have it."""
        return _yaml(self.default)


@dataclass(frozen=True)
class RunRecord:
    """The files of a run, parsed. What a file does not say is absent; a file that is not there is empty.

    Args:
        folder: where they lie.
        settings: run.yaml.
        metrics: the lines of metrics.jsonl.
        summary: summary.json.
        environment: environment.json.
        samples: the lines of samples.jsonl.
        certificate: certificate.json.
    """

    folder: Path
    settings: dict[str, Any]
    metrics: list[dict[str, Any]]
    summary: dict[str, Any]
    environment: dict[str, Any]
    samples: list[dict[str, Any]]
    certificate: dict[str, Any]

    @property
    def outline(self) -> dict[str, Any]:
        """The summary, and from the other files what it lacks of base, method or variant, r, steps and seconds."""
        settings = self.settings
        known = {"base": settings.get("model_name_or_path"), "steps": self.latest("step"), "seconds": self.latest("seconds")}
        known |= {"method": self.baseline} if self.baseline else {"variant": settings.get("variant")}
        known |= {"r": settings.get("r")} if self.baseline != "full" else {}
        return {name: value for name, value in known.items() if value is not None} | self.summary

    @property
    def baseline(self) -> str | None:
        """The method, where it is none of the family's."""
        return self.settings.get("baseline")

    def latest(self, name: str) -> Any:
        """The last value of `name` in metrics.jsonl; None if it is not there."""
        return next((line[name] for line in reversed(self.metrics) if line.get(name) is not None), None)

    @property
    def losses(self) -> Points:
        """(step, training loss)."""
        return points(self.metrics, "loss")

    @property
    def evaluations(self) -> dict[str, Points]:
        """(step, value) of each measurement on held-out rows, by its name."""
        return evaluated(self.metrics)

    @property
    def datasets(self) -> list[str]:
        """Names of what was trained on."""
        names = self.settings.get("dataset_name", [])
        return [str(name) for name in (names if isinstance(names, list) else [names])]

    def sections(self) -> list[tuple[str, list[Setting]]]:
        """The settings of run.yaml under the titles of their sections; last, those this version does not know.

        Of a baseline's run without those that only adapters of the family have.
        """
        left = {name: value for name, value in self.settings.items() if name not in self._others_settings}
        found = []
        for section in RunConfig.__bases__:
            if not issubclass(section, BaseModel):
                continue
            known = [_setting(name, field, left.pop(name)) for name, field in section.model_fields.items() if name in left]
            found.append(((section.__doc__ or "").strip().partition("\n")[0].rstrip(".").replace("`", ""), known))
        found.append(("Of another version", [Setting(name, value, None, "", True) for name, value in left.items()]))
        return [(title, settings) for title, settings in found if settings]

    @property
    def _others_settings(self) -> tuple[str, ...]:
        """Settings that mean nothing to the run's method."""
        if not self.baseline:
            return ()
        return (*FAMILYS_OWN, *ADAPTERS_OWN) if self.baseline == "full" else FAMILYS_OWN

    def chosen(self) -> list[Setting]:
        """The settings that differ from their defaults."""
        return [setting for _, settings in self.sections() for setting in settings if setting.differs]


def read_record(folder: Path) -> RunRecord:
    """Read what a run left in `folder`.

    Raises:
        InputError: there is no run.yaml or metrics.jsonl, or a file does not hold what it should.
    """
    for name in (RUN_FILE, METRICS_FILE):
        if not (folder / name).is_file():
            raise InputError(f"{folder} holds no run: it has no {name}.")
    settings, metrics = _mapping(folder / RUN_FILE), _lines(folder / METRICS_FILE)
    if any(not is_number(line.get("step")) for line in metrics):
        raise InputError(f"{folder / METRICS_FILE} has a line without a step.")
    return RunRecord(
        folder=folder,
        settings=settings,
        metrics=metrics,
        summary=_mapping(folder / SUMMARY_FILE),
        environment=_mapping(folder / ENVIRONMENT_FILE),
        samples=_lines(folder / SAMPLES_FILE),
        certificate=_mapping(folder / CERTIFICATE_FILE),
    )


def _setting(name: str, field: Any, value: Any) -> Setting:
    default = field.get_default(call_default_factory=True)
    required = default is PydanticUndefined
    return Setting(name, value, None if required else to_jsonable_python(default), field.description or "", required)


def _yaml(value: Any) -> str:
    if isinstance(value, str):
        return value
    return (
        yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**9)
        .removesuffix("...\n")
        .strip()
    )


def _mapping(file: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file; empty if there is no such file."""
    if not file.is_file():
        return {}
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"{file} cannot be read: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} holds a {type(content).__name__}, not names with values.")
    return content


def _lines(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    try:
        lines = read_json_lines(file)
    except ValueError as error:
        raise InputError(f"{file} cannot be read: {error}.") from error
    if any(not isinstance(line, dict) for line in lines):
        raise InputError(f"{file} has a line that does not hold names with values.")
    return lines
