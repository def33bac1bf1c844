"""Settings under the names that other tools and the papers' scripts give them.

A word of another tool is read as our key, with a notice; or it asks for something that is the case anyway, and is not used,
with a notice; or nothing here does what it asks for, and the error says why. docs/settings.md shows all of them.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, get_args

from bonetune.errors import InputError
from bonetune.spec import VARIANTS
from bonetune.training.settings import Baseline
from bonetune.training.words import FALSE_ASKS_NOTHING, IGNORED, REFUSED, RENAMED, THE_CASE_ANYWAY

Settings = dict[str, Any]


class ConfigNotice(UserWarning):
    """Settings were read under other names than their own, or not used. They are valid all the same."""


class Conversion(NamedTuple):
    """A word whose value changes too: the keys it sets, for people, and the function that makes their settings of the value."""

    into: str
    convert: Callable[[Any], Settings]


QUANTIZATION_WORDS = (
    *("load_in_4bit", "load_in_8bit", "quantization_bit", "bits"),
    *("bnb_4bit_quant_type", "quant_type", "double_quant", "double_quantization", "use_bnb_nested_quant"),
)

# RWKV-PEFT's words that mean something together.
RWKV_WORDS = ("lr_final", "lr_schedule", "train_type", "state_tune", "chunk_ctx")

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32", None: "auto"}
_ATTENTION = {"fa2": "flash_attention_2", "fa3": "flash_attention_3", "disabled": "eager"}
_TRUNCATION = {"keep_start": "right", "keep_end": "left"}
_FORMATS = {
    "alpaca": "alpaca",
    "sharegpt": "sharegpt",
    "chat_template": "messages",
    "completion": "text",
}


def translate(settings: Mapping[str, Any], below: Mapping[str, Any] | None = None) -> tuple[Settings, list[str]]:
    """Settings under our own names, and a notice for what was read under others or not used.

    Keys that nobody knows are left as they are.

    Args:
        settings: one source's settings: a file's, or a command line's.
        below: the settings, under our names, that these are laid over.

    Raises:
        InputError: words that nothing here corresponds to, or that contradict each other; all of them in one message.
    """
    found = {key: (key, value) for key, value in settings.items() if key not in WORDS}
    read: list[str] = []
    unused: dict[str, list[str]] = {}
    wrong: list[str] = []
    grouped = (*QUANTIZATION_WORDS, *RWKV_WORDS)
    converted = [(word, _convert, value) for word, value in settings.items() if word in WORDS and word not in grouped]
    quantization = {word: value for word, value in settings.items() if word in QUANTIZATION_WORDS and value is not None}
    base = {**(below or {}), **{key: value for key, (_, value) in found.items()}}
    converted += [(word, lambda w, v: _quantization(w, v, quantization, base), value) for word, value in quantization.items()]
    of_rwkv = {word: value for word, value in settings.items() if word in RWKV_WORDS and value is not None}
    for word, value in of_rwkv.items():
        converted.append((word, lambda w, v: _rwkv_training(w, v, of_rwkv, settings) or None, value))
    for word, convert, value in converted:
        try:
            ours = convert(word, value)
        except ValueError as error:
            wrong.append(f"{word}: {error}")
            continue
        except TypeError:  # of a converter that a list or a mapping cannot enter
            wrong.append(f"{word}: {value!r} is not a value for it")
            continue
        if ours is None:
            unused.setdefault(_WHY_UNUSED.get(word) or _ASKS_NOTHING.get(word, "empty"), []).append(word)
            continue
        for key, converted_value in ours.items():
            other, present = found.setdefault(key, (word, converted_value))
            if present != converted_value:
                wrong.append(f"{other} and {word} contradict each other: both are {key}, {present!r} and {converted_value!r}")
        if word not in OWN_VALUES:
            read.append(f"{word} as {', '.join(f'{key}={converted!r}' for key, converted in ours.items())}")
    if wrong:
        raise InputError("; ".join(wrong) + ".")
    notices = [f"Read under bonetune's names: {'; '.join(read)}."] if read else []
    if unused:
        reasons = [f"{', '.join(words)} ({why})" for why, words in unused.items()]
        notices.append(f"Not used: {'; '.join(reasons)}.")
    return {key: value for key, (_, value) in found.items()}, notices


def _convert(word: str, value: Any) -> Settings | None:
    """What a word's value says under our names; None if it is not used."""
    if word in OWN_VALUES:
        return OWN_VALUES[word](value)
    if value is None or word in _WHY_UNUSED or (word in FALSE_ASKS_NOTHING and value is False):
        return None
    if word in REFUSED:
        if not value or value in ("none", "no", "None") or value == THE_CASE_ANYWAY.get(word):
            return None
        raise ValueError(REFUSED[word])
    if word in CONVERTED:
        return CONVERTED[word].convert(value) or None
    return {_OUR_KEY[word]: value}


def _quantization(word: str, value: Any, words: Settings, base: Settings) -> Settings | None:
    """What one of the words about quantized weights says, given all of them and the settings they are laid over."""
    bits = words.get("bits", words.get("quantization_bit"))
    if bits in ("bf16", "fp16", "fp32"):
        return _dtype(bits) if word in ("bits", "quantization_bit") else None
    if bits not in (None, 4, 8, 16, 32, "nf4", "fp4", "int8"):
        raise ValueError(f"weights of {bits!r} bits are not known: say quantization: nf4, fp4 or int8, or leave it out")
    in_4bit = bool(words.get("load_in_4bit")) or bits in (4, "nf4", "fp4")
    in_8bit = bool(words.get("load_in_8bit")) or bits in (8, "int8")
    if in_4bit and in_8bit:
        raise ValueError("weights are of 4 bits or of 8, not both")
    before = base.get("quantization")
    stays_4bit = before in ("nf4", "fp4") and words.get("load_in_4bit", True) and bits not in (16, 32)
    if word in ("double_quant", "double_quantization", "use_bnb_nested_quant"):
        return {"bnb_4bit_use_double_quant": value} if in_4bit or stays_4bit else None
    kind = words.get("bnb_4bit_quant_type", words.get("quant_type", bits if bits in ("nf4", "fp4") else "nf4"))
    if in_4bit or (stays_4bit and word in ("bnb_4bit_quant_type", "quant_type")):
        return {"quantization": kind} if word != "load_in_8bit" else None
    if in_8bit:
        return {"quantization": "int8"} if word not in ("load_in_4bit", "bnb_4bit_quant_type", "quant_type") else None
    ends = {"load_in_4bit": before in ("nf4", "fp4"), "load_in_8bit": before == "int8"}.get(word, bits in (16, 32) and before)
    return {"quantization": None} if ends and word not in ("bnb_4bit_quant_type", "quant_type") else None


def _dtype(value: Any) -> Settings:
    name = value if value is None else str(value).removeprefix("torch.")
    return {"dtype": _DTYPES.get(name, name)}


def _share(value: Any) -> Settings:
    share = float(value)
    if not 0 <= share < 1:
        raise ValueError(f"{value} is not a share below 1; a number of steps is warmup_steps")
    return {"warmup_steps": share}


def _variant(value: Any) -> Settings:
    name = str(value).lower()
    if name in VARIANTS:
        return {"variant": name}
    if name in ("miss", "disha"):  # the families' names: any variant
        return {}
    others = "; for a comparison, say baseline" if name in get_args(Baseline) else ""
    raise ValueError(f"{value!r} is not of the Bone family: bonetune's variant is {', '.join(VARIANTS)}{others}")


def _initial(value: Any) -> Settings:
    if str(value).lower() == "true":
        return {}
    if str(value).lower() == "false":
        raise ValueError("adapters of a run start at zero, so that the model starts as it is")
    return _variant(value)


def _only_true(setting: str) -> Callable[[Any], Settings]:
    def check(value: Any) -> Settings:
        if not value:
            raise ValueError(f"bonetune trains nothing else: leave it out, or say {setting}")
        return {}

    return check


def _modules(value: Any) -> Settings:
    return {"target_modules": "all-linear" if value in ("all", ["all"]) else value}


def _names(value: Any) -> Any:
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else list(value)
    return names[0] if len(names) == 1 else names


def _reports(value: Any) -> Settings:
    nowhere = value is None or value in ("none", "None", ["none"], "")
    return {"report_to": [] if nowhere else [value] if isinstance(value, str) else value}


def _datasets(value: Any) -> Settings:
    """Axolotl's list of data sets."""
    if isinstance(value, str) or not isinstance(value, list) or not all(isinstance(d, dict) and "path" in d for d in value):
        raise ValueError("neither text nor a list of path and type: name the files in dataset_name")
    unknown = sorted({str(key) for d in value for key in d} - {"path", "type", "split", "data_files", "ds_type", "field"})
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)} of a data set have no counterpart: say dataset_format and dataset_field instead"
        )
    files = [file for d in value for file in ([d["path"]] if "data_files" not in d else _listed(d["data_files"]))]
    ours: Settings = {"dataset_name": _names(files)}
    for key, into in (("type", "dataset_format"), ("split", "dataset_split"), ("field", "dataset_field")):
        given = [d[key] for d in value if d.get(key) is not None]
        if not given:
            continue
        if len(given) != len(value) or any(other != given[0] for other in given):
            raise ValueError(f"the data sets differ in {key}: bring them into one format, or train on one")
        if key == "type" and given[0] not in _FORMATS:
            raise ValueError(f"type {given[0]!r} is not known: say dataset_format, and dataset_field for other names of fields")
        ours[into] = _FORMATS[given[0]] if key == "type" else [given[0]] if key == "field" else given[0]
    return ours


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _sampling(value: Any) -> Settings:
    if value not in ("group_by_length", "random"):
        raise ValueError(f"{value!r} is not known: examples are always shuffled, and group_by_length is true or false")
    return {"group_by_length": value == "group_by_length"}


def _rwkv_training(word: str, value: Any, words: Settings, all_words: Mapping[str, Any]) -> Settings:
    """What one of `RWKV_WORDS` says, given all of them."""
    if word == "train_type" and value not in ("none", "finetune", "state", "infctx"):
        raise ValueError(f"{value!r} is not known: it is none, state or infctx")
    if word == "train_type" and value == "finetune":
        raise ValueError(
            "bonetune trains adapters, and what train_parts names; all weights for comparisons only (baseline: full)"
        )
    if (word, value) == ("train_type", "state") or (word == "state_tune" and value):
        return {"train_parts": ["state"], "target_modules": []}
    if words.get("train_type") == "infctx" and word in ("train_type", "chunk_ctx"):
        return {"bptt_length": words.get("chunk_ctx", 512)}
    if word == "lr_schedule" and value not in ("cos", "cosine", "wsd"):
        raise ValueError(f"{value!r} is not known: it is cos or wsd")
    if word == "lr_schedule" and value == "wsd":
        return {"lr_scheduler_type": "warmup_stable_decay"}
    if word == "lr_final" and words.get("lr_schedule") == "wsd":
        start = all_words.get("lr_init", all_words.get("learning_rate", all_words.get("lr")))
        if not start:
            raise ValueError("where the rate ends is a share of where it begins in this schedule: say learning_rate, too")
        return {"lr_scheduler_kwargs": {"min_lr_ratio": float(value) / float(start)}}
    if word == "lr_final":
        ends = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": float(value)}}
        return ends if float(value) else {"lr_scheduler_type": "linear"}
    return {}


def _rwkv_data(value: Any) -> Settings:
    kinds = {"binidx": "tokens", "jsonl": "text", "sft": None}
    if value not in tuple(kinds):
        raise ValueError(f"{value!r} is not read: it is binidx, jsonl or sft")
    return {"dataset_format": kinds[value]} if kinds[value] else {}


def _rwkv_mask(value: Any) -> Settings:
    if value not in ("none", "pad", "qa"):
        raise ValueError(f"{value!r} is not known: padding is always masked, and completion_only_loss masks prompts")
    return {"completion_only_loss": True} if value == "qa" else {}


def _shuffled(value: Any) -> Settings:
    if not value:
        raise ValueError("examples are always shuffled, by the seed")
    return {}


def _rwkv_adapter(value: Any) -> Settings:
    """RWKV-PEFT's `bone_config` and the like."""
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is not a mapping: say r and variant by themselves")
    if any(value.get(key) for key in ("bone_load", "disha_load", "miss_load", "load")):
        raise ValueError(REFUSED["bone_load"])
    sizes = [value[key] for key in ("bone_r", "disha_r", "miss_r", "r") if key in value]
    return {"r": sizes[0]} | _variant(value.get("mode", "miss")) if sizes else {}


def _rwkv_quantization(value: Any) -> Settings:
    kinds = {"none": None, "4bit": "nf4", "8bit": "int8"}
    return {"quantization": kinds.get(value, value)}


def _precision(value: Any) -> Settings:
    kind = str(value).lower().partition("-")[0]
    if kind not in ("bf16", "fp16", "fp32", "32", "16"):
        raise ValueError(f"{value!r} is not known: say bf16: true or fp16: true, or neither")
    return {"bf16": True} if kind == "bf16" else {"fp16": True} if kind in ("fp16", "16") else {}


# Words whose values are converted.
CONVERTED: dict[str, Conversion] = {
    "warmup_ratio": Conversion("warmup_steps", _share),
    "torch_dtype": Conversion("dtype", _dtype),
    "adafactor": Conversion("optim", lambda v: {"optim": "adafactor"} if v else {}),
    "dataset": Conversion("dataset_name", lambda v: {"dataset_name": _names(v)}),
    "datasets": Conversion("dataset_name, dataset_format, dataset_split", _datasets),
    "dataset_text_field": Conversion("dataset_field", lambda v: {"dataset_field": [v]}),
    "interleave_probs": Conversion("dataset_weights", lambda v: {"dataset_weights": v.split(",") if isinstance(v, str) else v}),
    **dict.fromkeys(("val_size", "val_set_size"), Conversion("eval_size", lambda v: {"eval_size": v} if float(v) else {})),
    "validation_split_percentage": Conversion("eval_size", lambda v: {"eval_size": float(v) / 100}),
    **dict.fromkeys(
        ("train_on_inputs", "train_on_prompt"),
        Conversion("completion_only_loss, negated", lambda v: {"completion_only_loss": not v}),
    ),
    "truncation_mode": Conversion("truncation", lambda v: {"truncation": _TRUNCATION.get(v, v)}),
    "flash_attn": Conversion("attn_implementation", lambda v: {"attn_implementation": _ATTENTION.get(v, v)}),
    **{
        word: Conversion("attn_implementation", lambda v, name=name: {"attn_implementation": name} if v else {})
        for word, name in (
            *(("flash_attention", "flash_attention_2"), ("sdp_attention", "sdpa"), ("eager_attention", "eager")),
            ("use_flash_attention_2", "flash_attention_2"),
        )
    },
    **dict.fromkeys(("lora_target", "lora_target_modules"), Conversion("target_modules", _modules)),
    "lora_target_linear": Conversion("target_modules", lambda v: _modules("all") if v else {}),
    **dict.fromkeys(("adapter", "finetuning_type", "peft_type", "peft", "method"), Conversion("variant", _variant)),
    **dict.fromkeys(("init_weights", "init_bone_weights"), Conversion("variant", _initial)),
    **dict.fromkeys(("use_bone", "use_miss"), Conversion("variant", _only_true("variant"))),
    "use_bat": Conversion("variant", lambda v: {"variant": "bat"} if v else {}),
    "use_gradient_checkpointing": Conversion("gradient_checkpointing", lambda v: {"gradient_checkpointing": bool(v)}),
    "grad_cp": Conversion("gradient_checkpointing", lambda v: {"gradient_checkpointing": bool(v)}),
    "train_sampling_strategy": Conversion("group_by_length", _sampling),
    **dict.fromkeys(("bone_config", "disha_config", "miss_config"), Conversion("r, variant", _rwkv_adapter)),
    "quant": Conversion("quantization", _rwkv_quantization),
    "precision": Conversion("bf16, fp16", _precision),
    "wandb": Conversion("report_to, run_name", lambda v: {"report_to": ["wandb"], "run_name": v} if v else {}),
    "data_type": Conversion("dataset_format", _rwkv_data),
    "loss_mask": Conversion("completion_only_loss", _rwkv_mask),
    "data_shuffle": Conversion("seed", _shuffled),
    "random_seed": Conversion("seed", lambda v: {} if v == -1 else {"seed": v}),
    "lora_task_type": Conversion("task_type", lambda v: {"task_type": v}),
}
# Our own keys, with values that other tools write.
OWN_VALUES: dict[str, Callable[[Any], Settings]] = {
    "dtype": _dtype,
    "max_steps": lambda v: {"max_steps": None if v == -1 else v},
    "warmup_steps": lambda v: {"warmup_steps": 0 if v == -1 else v},
    "optim": lambda v: {"optim": "adamw_torch" if v == "none" else v},
    "report_to": _reports,
    "fsdp": lambda v: {"fsdp": v if v is None or isinstance(v, bool) else bool(v)},
}
_OUR_KEY = {word: key for key, words in RENAMED.items() for word in words.split()}
_WHY_UNUSED = {word: why for why, words in IGNORED.items() for word in words.split()}
_ASKS_NOTHING = {
    **dict.fromkeys((*REFUSED, *CONVERTED), "it asks for what is the case anyway"),
    **dict.fromkeys(QUANTIZATION_WORDS, "the weights are not quantized like that"),
    **dict.fromkeys(RWKV_WORDS, "it asks for what is the case anyway"),
}
# Every word that `translate` knows, and our key for it, if it has one.
WORDS: dict[str, str | None] = {
    **dict.fromkeys((*_WHY_UNUSED, *REFUSED)),
    **_OUR_KEY,
    **{word: conversion.into for word, conversion in CONVERTED.items()},
    **{
        word: "bnb_4bit_use_double_quant" if "double" in word or "nested" in word else "quantization"
        for word in QUANTIZATION_WORDS
    },
    "lr_final": "lr_scheduler_type, lr_scheduler_kwargs",
    "lr_schedule": "lr_scheduler_type",
    "train_type": "train_parts, bptt_length",
    "state_tune": "train_parts",
    "chunk_ctx": "bptt_length",
    **{key: key for key in OWN_VALUES},
}
