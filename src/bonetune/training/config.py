"""A run's settings, under the names that users of transformers and PEFT know."""

import difflib
from pathlib import Path
from typing import Any, Literal, cast

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from transformers.training_args import OptimizerNames

from bonetune.data import PAPER_PROMPT
from bonetune.data.encoding import Truncation
from bonetune.errors import InputError
from bonetune.spec import ShardSpec, Variant


class RunConfig(BaseModel):
    """Everything `bonetune train` can be told. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    # what is trained, on what, to where
    model_name_or_path: str
    dataset_name: str
    eval_dataset_name: str | None = None
    eval_dataset_split: str = "test"
    output_dir: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"

    # how rows become examples
    dataset_split: str = "train"
    dataset_field: tuple[str, str] | None = None
    prompt_template: str = PAPER_PROMPT
    max_length: PositiveInt = 1024
    truncation: Truncation = "error"

    # the adapter
    variant: Variant = "bone"
    r: PositiveInt = 64
    mini_r: PositiveInt = 1
    target_modules: str | tuple[str, ...] = "all-linear"
    exclude_modules: str | tuple[str, ...] | None = None
    rank_pattern: dict[str, PositiveInt] = Field(default_factory=dict)
    bone_dropout: float = Field(default=0.0, ge=0, lt=1)
    exact_update: bool = False
    bias: Literal["none", "all", "bone_only"] = "none"
    layers_to_transform: tuple[int, ...] | None = None
    modules_to_save: tuple[str, ...] | None = None

    # the optimization
    learning_rate: float | None = Field(default=None, gt=0)
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    per_device_train_batch_size: PositiveInt = 8
    gradient_accumulation_steps: PositiveInt = 1
    num_train_epochs: float = Field(default=1.0, gt=0)
    max_steps: int | None = Field(default=None, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    optim: str = "adamw_torch"
    bf16: bool = False
    gradient_checkpointing: bool = False
    seed: int = Field(default=0, ge=0, lt=2**32)

    # what is kept
    logging_steps: PositiveInt = 1
    save_steps: PositiveInt = 500
    save_total_limit: PositiveInt = 2
    eval_steps: PositiveInt | None = None

    @pydantic.model_validator(mode="before")
    @classmethod
    def _numbers_are_no_booleans(cls, settings: Any) -> Any:
        for name, value in settings.items() if isinstance(settings, dict) else ():
            known = cls.model_fields.get(name)
            if isinstance(value, bool) and known is not None and known.annotation is not bool:
                raise ValueError(f"{name}: input should not be a boolean, got {value}")
        return settings

    @pydantic.model_validator(mode="after")
    def _settings_fit_each_other(self) -> "RunConfig":
        if "{instruction}" not in self.prompt_template:
            raise ValueError("prompt_template lacks {instruction}: every prompt would be the same")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError("layers_to_transform needs target_modules to be a list of names")
        if self.eval_steps is not None and self.eval_dataset_name is None:
            raise ValueError("eval_steps without eval_dataset_name: there is nothing to evaluate on")
        optimizers = [str(name.value) for name in OptimizerNames]
        if self.optim not in optimizers:
            near = difflib.get_close_matches(self.optim, optimizers, n=1)
            raise ValueError(f"optim: transformers has no {self.optim!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        return self

    @property
    def spec(self) -> ShardSpec:
        """Variant and sizes of the adapter (before `rank_pattern`)."""
        return ShardSpec(self.variant, self.r, self.mini_r)

    def to_yaml(self) -> str:
        """The settings as a file that `load_config` reads."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_config(path: str | Path, overrides: dict[str, Any] | list[str] | None = None) -> RunConfig:
    """Read a YAML file and apply overrides.

    Args:
        path: the file.
        overrides: settings that win over the file's, as a mapping or as `key=value` texts whose values are YAML.

    Raises:
        InputError: no such file, not YAML, an unknown key (with the nearest known one), a value of the wrong type.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"Configuration file {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"Configuration file {path} is not YAML: {reason}") from error
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise InputError(f"Configuration file {path} holds a {type(content).__name__}, not settings (key: value).")
    return make_config(content | (parse_overrides(overrides) if isinstance(overrides, list) else overrides or {}))


def make_config(settings: dict[str, Any]) -> RunConfig:
    """A `RunConfig`, or `InputError` naming every key that is wrong."""
    settings = {key: _number(RunConfig.model_fields.get(key), value) for key, value in settings.items()}
    try:
        return RunConfig.model_validate(settings)
    except pydantic.ValidationError as error:
        raise InputError("; ".join(_explain(cast("dict[str, Any]", e)) for e in error.errors()) + ".") from error


def parse_overrides(overrides: list[str]) -> dict[str, Any]:
    """`key=value` texts as a mapping; values are read as YAML."""
    parsed = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key.strip():
            raise InputError(f"{override!r} is not an override: write key=value.")
        try:
            parsed[key.strip().removeprefix("--")] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"The value of {override!r} is not YAML: {' '.join(str(error).split())}") from error
    return parsed


def _number(field: Any, value: Any) -> Any:
    # YAML 1.1 reads 2e-4 as a text, which everyone means as a number
    if field is not None and isinstance(value, str) and field.annotation in (float, float | None):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _explain(error: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, RunConfig.model_fields, n=1, cutoff=0.5)
        return f"Unknown key {key!r}" + (f": did you mean {near[0]!r}?" if near else "")
    if error["type"] == "missing":
        return f"Missing key {key!r}"
    if error["type"] == "value_error":  # ours
        return str(error["ctx"]["error"])
    return f"{key}: {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"
