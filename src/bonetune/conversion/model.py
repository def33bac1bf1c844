"""A whole model, merged mostly, as a GGUF file for llama.cpp and Ollama."""

from pathlib import Path

import torch

from bonetune.certificates import WeightsCertificate
from bonetune.conversion.report import Conversion, write_reports
from bonetune.conversion.staging import Rejected, staged_for
from bonetune.errors import InputError
from bonetune.formats import Checkpoint
from bonetune.formats.checkpoint import local_folder
from bonetune.formats.gguf_model import NAME, write_gguf
from bonetune.formats.gguf_reading import read_weights
from bonetune.formats.ollama import write_modelfile
from bonetune.formats.tensors import ADAPTER_CONFIG
from bonetune.models import skeleton
from bonetune.rwkv.weights import is_pth

# What a cast to these numbers gives is expected bit for bit; of q8_0, within this share of each tensor's size.
_CASTS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_Q8_0_ERROR = 0.01


def convert_model(
    source: str, target: Path, dtype: str = "auto", pre_tokenizer: str | None = None, *, overwrite: bool = False
) -> Conversion:
    """Write a model as `target`, a GGUF file, and beside it `target`.Modelfile for Ollama.

    Args:
        source: folder of the model, or its id on the hub.
        target: the file.
        dtype: of its matrices: float32, float16, bfloat16, q8_0, or `auto`, the checkpoint's.
        pre_tokenizer: llama.cpp's name of how the tokenizer cuts texts; None: it is recognised.
        overwrite: replace the conversion that lies at `target`.

    Raises:
        InputError: an adapter, or a model that is not written as GGUF here.
        RunError: the file, read back, does not hold the model's weights.
    """
    if (Path(source) / ADAPTER_CONFIG).is_file():
        raise InputError(f"{source} is an adapter: merge it (bonetune merge), or convert it to gguf-lora.")
    if is_pth(source):
        raise InputError(f"{source} is an RWKV model, and GGUF is not written of those here.")
    folder = local_folder(source)
    with staged_for(target, overwrite=overwrite) as staged:
        written = write_gguf(str(folder), str(staged), dtype=dtype, pre_tokenizer=pre_tokenizer)
        modelfile = write_modelfile(staged.with_name(f"{staged.name}.Modelfile"), str(folder), target.name)
        certificate = _compare(staged, folder)
        conversion = Conversion(
            source=source,
            output=str(target),
            read_as="model",
            written_as=NAME,
            notes=(*written.notes, *modelfile.notes, f"Ollama: ollama create NAME -f {target.name}.Modelfile"),
            certificate=certificate,
        )
        write_reports(conversion, staged, base_fingerprint=Checkpoint(folder).fingerprint)
        if not certificate.holds:
            raise Rejected("the model", f"{certificate}.")
    return conversion


def _compare(written: Path, folder: Path) -> WeightsCertificate:
    checkpoint, different, errors, compared = Checkpoint(folder), [], {}, 0
    for parameter, got, numbers in read_weights(written, skeleton(str(folder))):
        compared += 1
        expected = checkpoint.tensor(checkpoint.name_of(parameter))
        if numbers in _CASTS:
            same = torch.equal(got, expected.to(_CASTS[numbers]).float())
        else:
            errors[parameter] = float((got - expected.float()).norm() / expected.float().norm().clamp_min(1e-30))
            same = errors[parameter] <= _Q8_0_ERROR
        if not same:
            different.append(parameter)
    return WeightsCertificate(compared, tuple(different), max(errors.values(), default=0.0))
