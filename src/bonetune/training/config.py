"""A run's settings, under the names that users of transformers and PEFT know."""

import difflib
import re
import tomllib
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Union, cast, get_args, get_origin

import pydantic
import yaml
from pydantic import ConfigDict
from transformers import SchedulerType
from transformers.training_args import OptimizerNames

from bonetune.errors import InputError
from bonetune.spec import ShardSpec
from bonetune.training import baselines
from bonetune.training.aliases import WORDS, ConfigNotice, translate
from bonetune.training.presets import preset
from bonetune.training.settings import (
    AdapterSettings,
    BaselineSettings,
    DataSettings,
    DistributedSettings,
    ModelSettings,
    OptimizationSettings,
    OutputSettings,
    RWKVSettings,
)

# Schedules that follow the evaluation loss.
HEEDING_EVALUATIONS = ("reduce_lr_on_plateau", "greedy")
_NAMES = re.compile(r"[\w./-]+(\s*,\s*[\w./-]+)+")  # and no regular expression


class RunConfig(
    DistributedSettings,
    OutputSettings,
    OptimizationSettings,
    RWKVSettings,
    BaselineSettings,
    AdapterSettings,
    DataSettings,
    ModelSettings,
    frozen=True,
):
    """Everything `bonetune train` can be told: the sections of `bonetune.training.settings`. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _numbers_are_no_booleans(cls, settings: Any) -> Any:
        for name, value in settings.items() if isinstance(settings, dict) else ():
            known = cls.model_fields.get(name)
            if isinstance(value, bool) and known is not None and "bool" not in str(known.annotation):
                raise ValueError(f"{name}: input should not be a boolean, got {value}")
        return settings

    @pydantic.model_validator(mode="after")
    def _settings_fit_each_other(self) -> "RunConfig":
        if contradictions := list(_contradictions(self)):
            raise ValueError("; ".join(contradictions))
        return self

    @property
    def dataset_names(self) -> tuple[str, ...]:
        """The data sets, also where there is one."""
        return (self.dataset_name,) if isinstance(self.dataset_name, str) else self.dataset_name

    @property
    def spec(self) -> ShardSpec:
        """Variant and sizes of the adapter (before `rank_pattern`)."""
        return ShardSpec(self.variant, self.r, self.mini_r)

    @property
    def method(self) -> str:
        """What is trained by: a variant of the family, or a baseline."""
        return self.baseline or self.variant

    @property
    def method_in_words(self) -> str:
        """The method with its sizes: "bone, r=64", "lora, r=8, lora_alpha=16"."""
        if self.baseline is None:
            return f"{self.variant}, r={self.r}"
        return baselines.method_in_words(self.baseline, self.r, self.baseline_kwargs)

    def to_yaml(self) -> str:
        """The settings as a file that `load_config` reads."""
        return yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def load_config(path: str | Path, overrides: dict[str, Any] | list[str] | None = None) -> RunConfig:
    """Read a YAML or TOML file and apply overrides.

    Args:
        path: the file; TOML if its name ends in .toml.
        overrides: settings that win over the file's, as in `make_config`.

    Raises:
        InputError: no such file, neither YAML nor TOML, and what `make_config` refuses.
    """
    return make_config(read_settings(Path(path)), overrides)


def make_config(settings: dict[str, Any], overrides: dict[str, Any] | list[str] | None = None) -> RunConfig:
    """A `RunConfig` of settings under our names or those of other tools.

    A key with a dot is one entry of a setting that is a mapping: `rank_pattern.q_proj`. The key `preset` names settings that
    these are laid over. What was read under other names, or not used, is told in warnings of the class `ConfigNotice`.

    Args:
        settings: a file's, or a program's.
        overrides: settings that win over those, as a mapping or as `key=value` texts whose values are YAML.

    Raises:
        InputError: an unknown key (with the nearest known one), a value of the wrong type, settings that contradict each
            other; all in one message.
    """
    merged: dict[str, Any] = {}
    notices: list[str] = []
    for layer in (settings, parse_overrides(overrides) if isinstance(overrides, list) else overrides or {}):
        if names := [key for key in layer if not isinstance(key, str)]:
            raise InputError(f"The key {names[0]!r} is no text: quote it if it is meant.")
        translated, found = translate(layer, merged)
        merged = _laid_over(merged, translated)
        notices += found
    name = merged.pop("preset", None)
    settings = (preset(name) if name is not None else {}) | merged
    settings = {key: _listed(key, value) for key, value in settings.items() if not _says_nothing(key, value)}
    try:
        config = RunConfig.model_validate(settings)
    except pydantic.ValidationError as error:
        raise InputError("; ".join(_explanations(cast("list[dict[str, Any]]", error.errors()))) + ".") from error
    for notice in notices:
        warnings.warn(notice, ConfigNotice, stacklevel=2)
    return config


def _says_nothing(key: str, value: Any) -> bool:
    """Whether a key stands there without a value, as in the files of other tools, and cannot be meant to be empty."""
    field = RunConfig.model_fields.get(key)
    return value is None and field is not None and not field.is_required() and "None" not in str(field.annotation)


def parse_overrides(overrides: list[str]) -> dict[str, Any]:
    """`key=value` texts as a mapping; values are read as YAML."""
    parsed = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key.strip():
            raise InputError(f"{override!r} is not an override: write key=value.")
        try:
            parsed[key.strip().removeprefix("--")] = yaml.load(value, _Loader)  # noqa: S506  (a safe loader)
        except yaml.YAMLError as error:
            raise InputError(f"The value of {override!r} is not YAML: {' '.join(str(error).split())}") from error
    return parsed


class _Loader(yaml.SafeLoader):
    """YAML with the numbers that everyone means (2e-4 is a text in YAML 1.1), and with each key once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        if twice := [key for n, key in enumerate(keys) if key in keys[:n]]:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r} stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Texts that `_Loader` would read as numbers are quoted."""


for _yaml_class in (_Loader, _Dumper):
    _yaml_class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def read_settings(path: Path) -> dict[str, Any]:
    kind = "TOML" if path.suffix == ".toml" else "YAML"
    try:
        text = path.read_text(encoding="utf-8")
        content = tomllib.loads(text) if kind == "TOML" else yaml.load(text, _Loader)  # noqa: S506  (a safe loader)
    except OSError as error:
        raise InputError(f"Configuration file {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"Configuration file {path} is not {kind}: {' '.join(str(error).split())}") from error
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise InputError(f"Configuration file {path} holds a {type(content).__name__}, not settings (key: value).")
    return content


def _laid_over(below: dict[str, Any], layer: dict[str, Any]) -> dict[str, Any]:
    """`layer` over `below`; keys with dots replace single entries of settings that are mappings."""
    merged = below | {key: value for key, value in layer.items() if not _is_entry(key)}
    for key, value in layer.items():
        if not _is_entry(key):
            continue
        setting, _, inner = key.partition(".")
        # names of modules have dots themselves; only free mappings have mappings in them
        path = inner.split(".") if "Any" in str(RunConfig.model_fields[setting].annotation) else [inner]
        merged[setting] = _with_entry(merged.get(setting), path, value, key)
    return merged


def _is_entry(key: str) -> bool:
    setting, dot, _ = key.partition(".")
    return bool(dot) and setting in RunConfig.model_fields and "dict" in str(RunConfig.model_fields[setting].annotation)


def _with_entry(mapping: Any, path: list[str], value: Any, key: str) -> dict[str, Any]:
    if mapping is not None and not isinstance(mapping, dict):
        raise InputError(f"{key}: there is {mapping!r} already, which is no mapping and has no entries.")
    first, *rest = path
    inner = _with_entry((mapping or {}).get(first), rest, value, key) if rest else value
    return {**(mapping or {}), first: inner}


def _listed(key: str, value: Any) -> Any:
    """A single value, or a text with commas, as the list that the setting takes."""
    field = RunConfig.model_fields.get(key)
    kinds = () if field is None else (field.annotation, *get_args(field.annotation))
    if not any(get_origin(kind) is tuple for kind in kinds) or isinstance(value, bool):
        return value
    if isinstance(value, str) and (str not in kinds or (key in AdapterSettings.model_fields and _NAMES.fullmatch(value))):
        return [name.strip() for name in value.split(",")]
    return [value] if isinstance(value, int | float) else value


def _contradictions(config: RunConfig) -> Iterator[str]:
    """What is wrong with the settings together, a sentence each."""
    c = config
    several = len(c.dataset_names)
    held_out = c.eval_dataset_name is not None or c.eval_size is not None
    for is_wrong, what in (
        ("{instruction}" not in c.prompt_template, "prompt_template lacks {instruction}: every prompt would be the same"),
        (
            c.layers_to_transform is not None and isinstance(c.target_modules, str),
            "layers_to_transform needs target_modules to be a list of names",
        ),
        (
            c.layers_pattern is not None and c.layers_to_transform is None,
            "layers_pattern without layers_to_transform: say which of the layers are meant",
        ),
        (c.mini_r != 1 and c.variant != "mini", f"mini_r={c.mini_r} is a size of variant mini; variant is {c.variant}"),
        (
            c.num_labels is not None and c.task_type != "SEQ_CLS",
            f"num_labels is for task_type SEQ_CLS; task_type is {c.task_type}",
        ),
        (
            c.dataset_format == "classification" and c.task_type != "SEQ_CLS",
            f"dataset_format classification needs task_type SEQ_CLS; task_type is {c.task_type}",
        ),
        (
            c.task_type == "SEQ_CLS" and c.dataset_format not in ("auto", "classification"),
            f"task_type SEQ_CLS needs rows with a label (dataset_format classification); dataset_format is {c.dataset_format}",
        ),
        (
            c.packing is True and c.task_type != "CAUSAL_LM",
            f"packing is for task_type CAUSAL_LM; task_type is {c.task_type}: leave packing out",
        ),
        (
            c.dataset_weights is not None and len(c.dataset_weights) != several,
            f"dataset_weights has {len(c.dataset_weights or ())} numbers for {several} of dataset_name: give one each",
        ),
        (
            c.eval_steps is not None and not held_out,
            "eval_steps without eval_dataset_name or eval_size: there is nothing to evaluate on",
        ),
        (
            c.eval_size is not None and c.eval_dataset_name is not None,
            "eval_size and eval_dataset_name are two evaluation sets: choose one",
        ),
        (
            c.eval_size is not None and c.eval_size >= 1 and not c.eval_size.is_integer(),
            f"eval_size={c.eval_size} is neither a share below 1 nor a whole number of rows",
        ),
        (c.streaming and c.max_steps is None, "streaming needs max_steps: how many rows there are is not known beforehand"),
        (
            c.head_learning_rate is not None and (c.baseline == "full" or (c.task_type != "SEQ_CLS" and not c.modules_to_save)),
            "head_learning_rate is of modules trained whole beside an adapter (SEQ_CLS, modules_to_save): leave it out",
        ),
        (
            c.head_learning_rate is not None and (c.fsdp or c.deepspeed is not None),
            "head_learning_rate is for one device or several (DDP): leave fsdp and deepspeed out",
        ),
        (
            c.streaming and c.eval_size is not None and c.eval_size < 1,
            f"eval_size={c.eval_size} of a stream is not known beforehand: give a number of rows, or eval_dataset_name",
        ),
        (
            c.lr_scheduler_type in HEEDING_EVALUATIONS and not held_out,
            f"lr_scheduler_type {c.lr_scheduler_type} goes by evaluations: set eval_dataset_name or eval_size",
        ),
        (
            c.bptt_length is not None and c.packing is True,
            "bptt_length goes through examples segment by segment, and packing lays them end to end: choose one",
        ),
        (
            c.bptt_length is not None and (c.fsdp or c.deepspeed is not None),
            "bptt_length trains whole models, on one device or several (DDP): leave fsdp and deepspeed out",
        ),
        (
            (c.bptt_length is not None or c.l2_wrap > 0) and c.task_type != "CAUSAL_LM",
            f"bptt_length and l2_wrap are for task_type CAUSAL_LM; task_type is {c.task_type}",
        ),
        (c.bf16 and c.fp16, "bf16 and fp16 are two precisions: choose one"),
        (
            c.bnb_4bit_use_double_quant and c.quantization not in ("nf4", "fp4"),
            f"bnb_4bit_use_double_quant is for quantization nf4 or fp4; quantization is {c.quantization}",
        ),
        (c.fsdp and c.deepspeed is not None, "fsdp and deepspeed both share the model out: choose one"),
        (c.fsdp_config is not None and not c.fsdp, "fsdp_config without fsdp: set fsdp: true"),
    ):
        if is_wrong:
            yield what
    yield from baselines.contradictions(c)
    yield from _unknown("optim", c.optim, OptimizerNames)
    yield from _unknown("lr_scheduler_type", c.lr_scheduler_type, SchedulerType)


def _unknown(setting: str, value: str, names: Any) -> Iterator[str]:
    known = [str(name.value) for name in names]
    if value not in known:
        near = difflib.get_close_matches(value, known, n=1)
        yield f"{setting}: transformers has no {value!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _explanations(errors: list[dict[str, Any]]) -> Iterator[str]:
    """One sentence for each wrong setting; what pydantic says of each type that a setting may have is joined."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    for error in errors:
        grouped.setdefault(_place(error["loc"]), []).append(error)
    for key, found in grouped.items():
        first = found[0]
        if first["type"] == "extra_forbidden":
            yield f"Unknown key {key!r}" + _suggestion(key)
        elif first["type"] == "missing":
            yield f"Missing key {key!r}"
        elif first["type"] == "value_error":  # ours
            yield str(first["ctx"]["error"])
        else:
            reasons = dict.fromkeys(f"{e['msg'][0].lower()}{e['msg'][1:]}" for e in found)
            yield f"{key}: {', or '.join(reasons)}, got {first['input']!r}"


def _place(loc: tuple[Any, ...]) -> str:
    """The key that pydantic complains of, and the entry in it, without the name of the type that was tried."""
    field = RunConfig.model_fields.get(loc[0]) if loc else None
    kinds = [kind for kind in get_args(field.annotation) if kind is not type(None)] if field is not None else []
    is_union = field is not None and get_origin(field.annotation) in (Union, UnionType) and len(kinds) > 1
    return ".".join(str(part) for part in (loc[0], *loc[2:]) if part != "[key]") if is_union else ".".join(map(str, loc))


def _suggestion(key: str) -> str:
    """The nearest known key, ours or another tool's."""

    def nearest(names: Iterable[str], cutoff: float) -> tuple[float, str]:
        found = difflib.get_close_matches(key, names, n=1, cutoff=cutoff)
        return (difflib.SequenceMatcher(None, found[0], key).ratio(), found[0]) if found else (0.0, "")

    ours, other = nearest((*RunConfig.model_fields, "preset"), 0.5), nearest(WORDS, 0.8)
    if not ours[1] and not other[1]:
        return ""
    if other[0] <= ours[0]:
        return f": did you mean {ours[1]!r}?"
    means = WORDS[other[1]]
    return f": did you mean {other[1]!r}" + (f", which is {means} here?" if means else "?")
