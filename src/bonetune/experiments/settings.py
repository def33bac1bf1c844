"""The settings of a comparison: which methods, at which learning rates, with which seeds, on what, measured how."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt

from bonetune.errors import InputError
from bonetune.evaluation.ledger import file_name
from bonetune.spec import VARIANTS
from bonetune.training.config import RunConfig, make_config, parse_overrides, read_settings
from bonetune.training.learning_rate import default_learning_rate
from bonetune.training.settings import AdapterSettings

# Peak rates that a sweep of a baseline begins with. The grid grows from there; see `Comparison.most_rates`.
BASELINE_RATES: dict[str, tuple[float, ...]] = {
    "full": (1e-5, 2e-5, 4e-5),
    "lora": (1e-3, 2e-3, 4e-3),
    "rslora": (2e-4, 4e-4, 8e-4),
    "lora+": (2e-4, 4e-4, 8e-4),
    "dora": (1e-3, 2e-3, 4e-3),
    "pissa": (2.5e-4, 5e-4, 1e-3),
    "olora": (2.5e-4, 5e-4, 1e-3),
    "lora-ga": (2.5e-4, 5e-4, 1e-3),
    "milora": (1e-3, 2e-3, 4e-3),
    "miss": (2e-4, 4e-4, 8e-4),
    "miss-bat": (1e-4, 2e-4, 4e-4),
}
METHODS = (*VARIANTS, *BASELINE_RATES)
_NAME = re.compile(r"[\w+-][\w.+-]*")
# Settings of a run that say what is trained; all others say how, or on what.
OF_THE_METHOD = {*AdapterSettings.model_fields, "baseline", "baseline_kwargs", "train_parts"}
# Bytes of a test's name, which a file bears.
_LONGEST_NAME = 200
# Settings of a run that a comparison decides itself.
_DECIDED = ("output_dir", "learning_rate", "seed", "report_to", "run_name")


class Examination(BaseModel, frozen=True, extra="forbid"):
    """Tasks on one set of rows, as `bonetune eval` takes them."""

    tasks: tuple[str, ...] = Field(min_length=1, description="names of tasks; the first one's score counts")
    name: str | None = Field(default=None, description="stands behind the tasks' names, where several tests have the same")
    data: str | None = Field(default=None, description="a file of rows or a data set; None: the protocol's own")
    split: str | None = Field(default=None, description="split, or a slice of it")
    limit: PositiveInt | None = Field(default=None, description="the first so many rows")
    dataset_format: str | None = Field(default=None, description="how rows are read; None: as in training")
    dataset_field: tuple[str, ...] | None = Field(default=None, description="names of the fields; None: as in training")
    few_shot: str | None = Field(default=None, description="from where examples are shown")
    prompt_template: str | None = Field(default=None, description="with {instruction} in it; None: the task's")
    batch_size: PositiveInt = Field(default=32, description="rows at a time")
    max_new_tokens: PositiveInt | None = Field(default=None, description="longest answer; None: the protocol's")
    unsafe_code: bool = Field(default=False, description="run programs a model writes even where nothing holds them")

    def arguments(self) -> dict[str, Any]:
        """As `bonetune.evaluate` takes them."""
        told = self.model_dump(exclude={"tasks", "name", "split"})
        return told | {"dataset_split": self.split}

    def called(self, task: str) -> str:
        """What a task is called in the comparison."""
        return task if self.name is None else f"{task} ({self.name})"


class Method(BaseModel, frozen=True, extra="allow"):
    """A row of the comparison: any settings of `bonetune train`, laid over the shared ones, and its grid of learning rates.

    Without an `r`, the rank whose trainable parameters come nearest to the reference's is taken.
    """

    learning_rates: tuple[PositiveFloat, ...] | None = Field(
        default=None,
        min_length=1,
        description="the first grid, ascending; None: around the method's default. One alone is not swept",
    )
    rate_of: str | None = Field(default=None, description="takes over the rate chosen for this other method")

    @property
    def settings(self) -> dict[str, Any]:
        """Those of `bonetune train`."""
        return dict(self.model_extra or {})


class Comparison(BaseModel, frozen=True, extra="forbid"):
    """Everything `bonetune compare` can be told. Unknown keys are errors."""

    model_config = ConfigDict(validate_default=True, allow_inf_nan=False)

    output_dir: str = Field(description="folder of the comparison")
    title: str = Field(default="", description="what the report is called")
    description: str = Field(default="", description="what is compared on what, for the report")
    train: dict[str, Any] = Field(description="settings of `bonetune train` that all runs share")
    methods: dict[str, Method] = Field(min_length=1, description=f"by name; the names known are {', '.join(METHODS)}")
    match: str | None = Field(
        default=None, description="the method whose trainable parameters the others match; None: the first with an r"
    )
    against: tuple[str, ...] = Field(default=(), description="methods that all others are compared with; (): lora and bone")
    sweep_seed: NonNegativeInt = Field(default=0, description="with it, the learning rate is chosen")
    seeds: tuple[NonNegativeInt, ...] = Field(default=(1, 2, 3), min_length=1, description="of the runs that count")
    validation: Examination = Field(description="by its first task the learning rate is chosen")
    tests: tuple[Examination, ...] = Field(min_length=1, description="the runs that count are examined by")
    text: Examination | None = Field(default=None, description="held-out plain text, on which forgetting is measured")
    scales: tuple[float, ...] = Field(
        default=(), description="the trained update times each of these: the learning-forgetting curve"
    )
    most_rates: PositiveInt = Field(
        default=6, description="a grid whose best rate is its first or last grows by factors, to so many rates at most"
    )
    keep_weights: bool = Field(default=False, description="keep the trained weights of each run")
    engine: Literal["processes", "ray"] = Field(
        default="processes", description="each run in a process of its own: here, or on the machines of a Ray cluster"
    )
    parallel: PositiveInt = Field(default=1, description="runs at a time")
    resources: dict[str, float] = Field(default_factory=dict, description="ray: what a run needs: num_cpus, num_gpus, ...")

    @pydantic.model_validator(mode="before")
    @classmethod
    def _names_alone(cls, settings: Any) -> Any:
        """Methods may be a list of names, tests one examination, and `text` a file."""
        if not isinstance(settings, dict):
            return settings
        settings = dict(settings)
        if isinstance(settings.get("methods"), list | tuple):
            settings["methods"] = {name: {} for name in settings["methods"]}
        if isinstance(settings.get("methods"), dict):
            settings["methods"] = {name: _described(name, given) for name, given in settings["methods"].items()}
        if isinstance(settings.get("tests"), dict):
            settings["tests"] = [settings["tests"]]
        if isinstance(settings.get("text"), str):
            settings["text"] = {"tasks": ["forgetting"], "data": settings["text"]}
        elif isinstance(settings.get("text"), dict):
            settings["text"] = {"tasks": ["forgetting"]} | settings["text"]
        return settings

    @pydantic.model_validator(mode="after")
    def _fits(self) -> "Comparison":
        if wrong := [name for name in _DECIDED if name in self.train]:
            raise ValueError(f"train.{wrong[0]}: a comparison decides it itself: leave it out")
        for label, name in [("match", self.match), *(("against", name) for name in self.against)]:
            if name is not None and name not in self.methods:
                raise ValueError(f"{label} names {name!r}, which is not among the methods {', '.join(self.methods)}")
        if wrong := [name for name in self.methods if not _NAME.fullmatch(name)]:
            raise ValueError(f"methods.{wrong[0]}: a name is of letters, digits and . _ + -, for folders bear it")
        for name, method in self.methods.items():
            if method.rate_of is not None and (method.rate_of not in self.methods or method.learning_rates is not None):
                raise ValueError(f"methods.{name}.rate_of: name another method, and leave learning_rates out")
            if method.rate_of is not None and self.methods[method.rate_of].rate_of is not None:
                raise ValueError(f"methods.{name}.rate_of: {method.rate_of} has no rate of its own")
            rates = method.learning_rates
            if rates is not None and list(rates) != sorted(set(rates)):
                raise ValueError(f"methods.{name}.learning_rates should ascend, got {list(rates)}")
        if self.sweep_seed in self.seeds:
            raise ValueError(f"sweep_seed {self.sweep_seed} is among the seeds: a run that chose the rate cannot count")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)} names one twice")
        called = [test.called(task) for test in self.tests for task in test.tasks]
        if twice := [name for number, name in enumerate(called) if name in called[:number]]:
            raise ValueError(f"tests has {twice[0]!r} twice: give each its name")
        files = [file_name(name) for name in called]
        if twice := [name for name, file in zip(called, files, strict=True) if files.count(file) > 1]:
            raise ValueError(f"tests has {' and '.join(map(repr, twice))}, whose records would share a file: rename one")
        if long := [name for name, file in zip(called, files, strict=True) if len(file.encode()) > _LONGEST_NAME]:
            raise ValueError(f"tests has {long[0]!r:.60}..., too long for a file's name: give it a shorter one")
        if self.text is not None and self.text.tasks != ("forgetting",):
            raise ValueError("text.tasks: it is forgetting alone: leave it out")
        return self

    def run(self, name: str, r: int | None, learning_rate: float, seed: int, output_dir: Path) -> RunConfig:
        """The settings of one run. Raises `InputError` if they contradict each other."""
        method = self.methods[name]
        sizes = {} if r is None else {"r": r}
        decided = {"learning_rate": learning_rate, "seed": seed, "output_dir": str(output_dir)}
        # what a single run shows and rehearses is of no use in hundreds of them
        quiet = {"rehearsal": False, "sample_prompts": 0, "save_total_limit": 1}
        try:
            return make_config(quiet | self.train, method.settings | sizes | decided)
        except InputError as error:
            raise InputError(f"methods.{name}: {error}") from error

    @property
    def references(self) -> tuple[str, ...]:
        """The methods that all others are compared with."""
        return self.against or tuple(name for name in ("lora", "bone") if name in self.methods) or (next(iter(self.methods)),)

    def grid(self, name: str, config: RunConfig) -> tuple[float, ...]:
        """The learning rates that a method's sweep begins with."""
        method = self.methods[name]
        if method.learning_rates is not None:
            return method.learning_rates
        if config.baseline is not None:
            return BASELINE_RATES[config.baseline]
        rate = default_learning_rate(config.spec)
        return rate / 2, rate, rate * 2

    def to_yaml(self) -> str:
        """The settings as a file that `load_comparison` reads."""
        content = self.model_dump(mode="json", exclude={"methods"})
        content["methods"] = {
            name: method.settings | method.model_dump(mode="json", exclude_none=True) for name, method in self.methods.items()
        }
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def load_comparison(
    config: Comparison | str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | list[str] | None = None
) -> Comparison:
    """The settings of a file or a mapping, with overrides laid over them: `train.max_steps=10`, `seeds=[1]`.

    Raises:
        InputError: no such file, an unknown key, a value of the wrong type, or settings that contradict each other.
    """
    if isinstance(config, Comparison):
        content: dict[str, Any] = config.model_dump()
        content["methods"] = {name: m.model_dump(exclude_none=True) for name, m in config.methods.items()}
    else:
        content = dict(config) if isinstance(config, Mapping) else read_settings(Path(config))
    given = parse_overrides(overrides) if isinstance(overrides, list) else dict(overrides or {})
    for key, value in given.items():
        _lay_over(content, key.split("."), value, key)
    try:
        return Comparison.model_validate(content)
    except pydantic.ValidationError as error:
        raise InputError("; ".join(_explained(found) for found in error.errors()) + ".") from error


def _lay_over(content: dict[str, Any], path: list[str], value: Any, key: str) -> None:
    """`value` in the place of one entry; `tests.0` is the first test."""
    first, *rest = path
    if not rest:
        content[first] = value
        return
    inner = content.get(first)
    if first == "methods" and isinstance(inner, list):
        inner = {name: {} for name in inner}
    if isinstance(inner, list) and len(rest) > 1 and rest[0].isdecimal() and int(rest[0]) < len(inner):
        content[first] = [dict(entry) if isinstance(entry, dict) else entry for entry in inner]
        _lay_over(content[first][int(rest[0])], rest[1:], value, key)
        return
    if inner is not None and not isinstance(inner, dict):
        raise InputError(f"{key}: {first} is {inner!r:.60}, which has no such entry.")
    content[first] = dict(inner or {})
    _lay_over(content[first], rest, value, key)


def _described(name: str, given: Any) -> Any:
    """A method's settings, with those that its name says."""
    if isinstance(given, Method) or not isinstance(given, dict | None):
        return given
    given = dict(given or {})
    if "variant" in given or "baseline" in given:
        return given
    if name in VARIANTS:
        return {"variant": name} | given
    if name in BASELINE_RATES:
        return {"baseline": name} | given
    raise ValueError(f"methods.{name} is no method: choose from {', '.join(METHODS)}, or give it a variant or a baseline")


def _explained(error: Any) -> str:
    place = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"Unknown key {place!r}"
    if error["type"] == "missing":
        return f"Missing key {place!r}"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return f"{place}: {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r:.60}"
