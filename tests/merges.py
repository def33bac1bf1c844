"""Adapters on disk and what merging made of them."""

import json
import sys

import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import bonetune
from bonetune.merging.plan import NotStreamed

MERGE = sys.modules["bonetune.merging.merge"]


def save_adapter(base, folder, settings, seed=0):
    """An adapter of random values on the model in folder `base`; the adapted model."""
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "bone_block" not in name and "lora_" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)  # what is trained whole
    model.save_pretrained(folder)
    return model


def stored(folder):
    """All tensors of a model's files, by name."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def files(folder):
    """The content of every file in a folder but its certificate, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "certificate.json"}


def merge_in_memory(monkeypatch, adapter, output, **options):
    """`bonetune.merge` as if the base model's files could not be merged one by one."""

    def refuse(*arguments, **options):
        raise NotStreamed("of a test")

    with monkeypatch.context() as patch:
        patch.setattr(MERGE, "make_plan", refuse)
        result = bonetune.merge(adapter, output, **options)
    assert result.in_memory == "of a test"
    return result


def assert_same_bits(ours, theirs):
    """Two folders hold the same tensors."""
    ours, theirs = stored(ours), stored(theirs)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name


def change_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
