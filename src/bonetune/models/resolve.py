"""What a user names as a model: a Hugging Face folder or id, an RWKV file, or the folder of an adapter on one."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bonetune.data.formats import TaskName
from bonetune.errors import AdapterFileError, BonetuneError, InputError, first_line
from bonetune.files import SUMMARY_FILE, read_config, read_run
from bonetune.models.quantization import let_train, quantization_config
from bonetune.rwkv import WorldTokenizer, from_pth
from bonetune.rwkv.weights import is_pth

ADAPTER_CONFIG, _TOKENIZER_CONFIG = "adapter_config.json", "tokenizer_config.json"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# As PEFT knows them, which trains them whole.
CLASSIFIERS_HEADS: tuple[str, ...] = ("classifier", "score")
AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}


@dataclass(frozen=True)
class Loaded:
    """A model ready for use: `model` in evaluation mode, its tokenizer, and where both came from."""

    model: Any
    tokenizer: Any
    base: str
    adapter: str | None = None
    task_type: TaskName = "CAUSAL_LM"


def parse_dtype(name: str) -> torch.dtype | str:
    """float32, bfloat16, float16 as torch dtypes; `auto`, the checkpoint's own, as it is. Else `InputError`."""
    if name == "auto":
        return name
    if name not in tuple(_DTYPES):
        raise InputError(f"Unknown dtype {name!r}: choose auto, {', '.join(_DTYPES)}.")
    return _DTYPES[name]


def load_tokenizer(name: str, *, trust_remote_code: bool = False, eos_token: str | None = None) -> Any:
    """The tokenizer of a model, or of a folder with a tokenizer alone, with a padding token: its own, else its end of text.

    Args:
        name: a folder, or an id on the hub; for an RWKV `.pth`, the tokenizer is that of its folder, else RWKV's own.
        trust_remote_code: run code that comes with it.
        eos_token: a token of its vocabulary that ends an answer, instead of its own end of text.

    Raises:
        InputError: there is no tokenizer, or `eos_token` is not one token of it.
    """
    from transformers import AutoTokenizer

    if not any((Path(name) / file).is_file() for file in (ADAPTER_CONFIG, _TOKENIZER_CONFIG)):
        check_name(name)
    beside = str(Path(name).parent) if is_pth(name) else name
    try:
        if is_pth(name) and not (Path(beside) / _TOKENIZER_CONFIG).is_file():
            tokenizer: Any = WorldTokenizer()
        else:
            tokenizer = AutoTokenizer.from_pretrained(beside, trust_remote_code=trust_remote_code)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"Model {name!r} has no tokenizer that can be loaded: {first_line(error)}") from error
    if eos_token is not None:
        known = _id_of(tokenizer, eos_token)
        # as an added token, so that a text that has it in it makes one token of it; one that is added stays as it is
        token = tokenizer.added_tokens_decoder.get(known, tokenizer.convert_ids_to_tokens(known))
        tokenizer.add_special_tokens({"eos_token": token})
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _id_of(tokenizer: Any, text: str) -> int:
    """The id of the one token of the vocabulary that `text` is, by name or as text. Raises `InputError` if it is none."""
    known = tokenizer.convert_tokens_to_ids(text)
    if known is not None and tokenizer.convert_ids_to_tokens(known) == text:
        return known
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise InputError(
            f"eos_token {text!r} is no token of the tokenizer, which makes {len(ids)} of it: choose one of its vocabulary, "
            f"such as its own end of text, {tokenizer.eos_token!r}."
        )
    return ids[0]


def load_base(
    name: str,
    dtype: str = "auto",
    *,
    task_type: TaskName = "CAUSAL_LM",
    quantization: str | None = None,
    double_quantization: bool = False,
    attn_implementation: str = "auto",
    trust_remote_code: bool = False,
    classes: Sequence[str] | None = None,
    tokenizer: Any = None,
    initial_state: bool = False,
) -> Loaded:
    """Load a model and its tokenizer.

    Args:
        name: a folder written by `save_pretrained`, an id on the hub, or an RWKV `.pth`.
        dtype: of the weights; `auto` takes the checkpoint's.
        task_type: CAUSAL_LM, SEQ_CLS or SEQ_2_SEQ_LM.
        quantization: one of `QUANTIZATIONS`; None loads the weights as they are.
        double_quantization: quantize 4-bit weights' scales too.
        attn_implementation: transformers' name; `auto` leaves the choice to it.
        trust_remote_code: run code that comes with the model.
        classes: SEQ_CLS: names of the classes; one alone, or none, is regression.
        tokenizer: one already loaded.
        initial_state: of RWKV models: whether they have states to begin with, for state tuning.

    Raises:
        InputError: there is no such model, no tokenizer beside it, or no package for the quantization.
    """
    import transformers

    check_name(name)
    if is_pth(name):
        check_rwkv(name, task_type, attn_implementation)
    tokenizer = tokenizer or load_tokenizer(name, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {"dtype": parse_dtype(dtype), "trust_remote_code": trust_remote_code}
    if quantization is not None:
        heads = [*CLASSIFIERS_HEADS] if task_type == "SEQ_CLS" else None
        options["quantization_config"] = quantization_config(quantization, dtype, double_quantization, heads)
    if is_pth(name):
        options.pop("trust_remote_code")
        model: Any = from_pth(name, initial_state=initial_state, **options)
        if len(tokenizer) > model.config.vocab_size:
            raise InputError(
                f"The tokenizer has {len(tokenizer)} tokens, and {name} has embeddings for {model.config.vocab_size}: it is of "
                f"another model. Put the model's own, with its {_TOKENIZER_CONFIG}, into the folder of {Path(name).name}."
            )
        let_train(model)
        return Loaded(model.eval(), tokenizer, name)
    if attn_implementation != "auto":
        options["attn_implementation"] = attn_implementation
    if task_type == "SEQ_CLS" and classes is not None:
        options |= {"num_labels": max(len(classes), 1), "problem_type": None if len(classes) > 1 else "regression"}
        if len(classes) > 1:
            options |= {"id2label": dict(enumerate(classes)), "label2id": {label: i for i, label in enumerate(classes)}}
    if initial_state:
        options["initial_state"] = True
    try:
        model = getattr(transformers, AUTO_CLASSES[task_type]).from_pretrained(name, **options)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise InputError(f"Model {name!r} cannot be loaded for {task_type}: {first_line(error)}") from error
    let_train(model)
    if task_type == "SEQ_CLS":
        model.config.pad_token_id = tokenizer.pad_token_id  # by which such models find a text's last token
    return Loaded(model.eval(), tokenizer, name, task_type=task_type)


def task_type_of(name: str, *, trust_remote_code: bool = False) -> TaskName:
    """What a model, or an adapter, is for: as the adapter says, else as the model's architecture does.

    Raises `InputError` if there is no such model.
    """
    if (Path(name) / ADAPTER_CONFIG).is_file():
        task_type = _adapter_config(Path(name)).get("task_type")
        return task_type if task_type in tuple(AUTO_CLASSES) else "CAUSAL_LM"

    from transformers import AutoConfig

    check_name(name)
    if is_pth(name):
        return "CAUSAL_LM"
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(f"Model {name!r} cannot be loaded: {first_line(error)}") from error
    if any(architecture.endswith("ForSequenceClassification") for architecture in config.architectures or ()):
        return "SEQ_CLS"
    return "SEQ_2_SEQ_LM" if config.is_encoder_decoder else "CAUSAL_LM"


def check_name(name: str) -> None:
    """Raise `InputError` if `name` is a path at which no model lies."""
    path = Path(name)
    if is_pth(name):
        if not path.is_file():
            raise InputError(f"Model file {name} does not exist.")
        return
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"Model folder {name} has no config.json: it is not a Hugging Face model.")
    if not path.is_dir() and (path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise InputError(f"Model folder {name} does not exist.")


def check_rwkv(name: str, task_type: str, attn_implementation: str = "auto") -> None:
    """Raise `InputError` if an RWKV file is asked for what RWKV models do not have."""
    if task_type != "CAUSAL_LM":
        raise InputError(f"{name} is a file of an RWKV model, which writes on: task_type {task_type} is not for it.")
    if attn_implementation != "auto":
        raise InputError(f"{name} is a file of an RWKV model, which does not attend: leave attn_implementation at auto.")


def load_model(
    name: str, dtype: str = "auto", base: str | None = None, *, quantized: bool = True, trust_remote_code: bool = False
) -> Loaded:
    """Load a model, or an adapter on its base model.

    What a run of `bonetune train` noted beside its adapter is heeded: the task, the classes, how the base was quantized.

    Args:
        name: as for `load_base`, or the folder of an adapter.
        dtype: of the base model's weights; `auto` is the checkpoint's, or what a quantized base was trained in.
        base: the adapter's base model, if it is not where adapter_config.json says.
        quantized: quantize the base as it was in training; else take its weights as they are.
        trust_remote_code: run code that comes with the model or the adapter.

    Raises:
        InputError: there is no such model, the adapter does not say what it was trained on, or its training trusted code that
            the caller does not.
        AdapterFileError: the adapter's tensors do not fit the base model.
    """
    folder = Path(name)
    if not (folder / ADAPTER_CONFIG).is_file():
        if base is not None:
            raise InputError(f"{name} is not an adapter folder (no {ADAPTER_CONFIG} in it), so it takes no base model.")
        task_type = task_type_of(name, trust_remote_code=trust_remote_code)
        return load_base(name, dtype, task_type=task_type, trust_remote_code=trust_remote_code)

    from peft import PeftModel

    import bonetune  # noqa: F401  (makes BONE known to PEFT, whoever calls this)

    config = _adapter_config(folder)
    run = read_run(folder)
    check_trust(folder, trust_remote_code)
    quantization = run.get("quantization") if quantized else None
    if quantization is not None and dtype == "auto":
        dtype = run.get("dtype", "auto")  # codes are made of the weights in that dtype
    loaded = load_base(
        _base_of(folder, config, base),
        dtype,
        task_type=task_type_of(name),
        quantization=quantization,
        double_quantization=run.get("bnb_4bit_use_double_quant", False),
        trust_remote_code=trust_remote_code,
        classes=_classes(folder),
        initial_state=_has_states(config),
        # the adapter's own is what it was trained with; a chat template may have been added
        tokenizer=load_tokenizer(name, trust_remote_code=trust_remote_code) if (folder / _TOKENIZER_CONFIG).is_file() else None,
    )
    try:
        model = PeftModel.from_pretrained(loaded.model, name)
    except KeyError as error:
        raise AdapterFileError(f"Adapter {name} lacks the tensor {error.args[0]}.") from error
    except BonetuneError:
        raise
    except Exception as error:  # a wrong value in the adapter's files leads PEFT to any
        reason = str(error) or type(error).__name__
        raise AdapterFileError(f"Adapter {name} cannot be loaded onto {loaded.base}: {reason}") from error
    return Loaded(model.eval(), loaded.tokenizer, loaded.base, name, loaded.task_type)


def check_trust(adapter: Path, trust_remote_code: bool) -> None:
    """Raise `InputError` if an adapter was trained with code from outside, and the caller does not allow such code.

    What lies beside an adapter may only ask for it: it may come from anywhere, as the code may.
    """
    if read_run(adapter).get("trust_remote_code") and not trust_remote_code:
        raise InputError(
            f"{adapter} was trained with trust_remote_code: loading it runs code that comes with its base model, or with "
            "itself. Pass --trust-remote-code (trust_remote_code=True) if you trust both."
        )


def _has_states(config: dict[str, Any]) -> bool:
    """Whether an adapter trained the states that an RWKV model begins with."""
    names = config.get("trainable_parameters") or ()
    return any("time_state" in name for name in ([names] if isinstance(names, str) else names))


def _classes(folder: Path) -> list[str] | None:
    file = folder / SUMMARY_FILE
    classes = read_config(file).get("classes") if file.is_file() else None
    if not isinstance(classes, list | None):
        raise AdapterFileError(f"{file} has classes {classes!r}, which should be a list of names.")
    return classes


def _adapter_config(folder: Path) -> dict[str, Any]:
    """An adapter's configuration, after checking that the folder can be loaded."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    config = read_config(folder / ADAPTER_CONFIG)
    if "peft_type" not in config:
        raise AdapterFileError(f"{folder / ADAPTER_CONFIG} has no peft_type: it does not say which method the adapter is of.")
    if config["peft_type"] not in tuple(PEFT_TYPE_TO_CONFIG_MAPPING):
        raise AdapterFileError(f"{folder / ADAPTER_CONFIG}: PEFT knows no method {config['peft_type']!r}.")
    if not any((folder / name).is_file() for name in ("adapter_model.safetensors", "adapter_model.bin")):
        raise AdapterFileError(f"Adapter {folder} has a configuration but no weights (adapter_model.safetensors).")
    return config


def _base_of(folder: Path, config: dict[str, Any], given: str | None) -> str:
    if given is not None:
        return given
    if not config.get("base_model_name_or_path"):
        raise InputError(f"{folder / ADAPTER_CONFIG} names no base model: pass --base MODEL.")
    return str(config["base_model_name_or_path"])
