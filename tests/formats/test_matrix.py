"""Every pair of formats that there is: written by the one, read as the other, the same outputs; PEFT's own layers are asked."""

import json
import shutil

import pytest
import torch
from adapted_models import logits
from conftest import llama
from peft import LoraConfig, MissConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import bonetune
from bonetune import VARIANTS, BoneConfig
from bonetune.formats import READERS

# (variant, r): 5 leaves a ragged shard of every layer's 32 or 48 columns
KINDS = [("bone", 4), ("bone", 5), ("mini", 4), ("mini", 5), *((v, 4) for v in VARIANTS if v not in ("bone", "mini"))]
FOLDERS = ("peft-bone", "miss", "lora", "tensors")
MISS = {"bone": True, "mini": "mini", "bat": "bat"}
# a Llama's smallest side: BAT's LoRA of that rank loses nothing
FULL = 48


def can_hold(kind, variant):
    return {"miss": variant in MISS, "lora": variant in ("bone", "mini")}.get(kind, True)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder)
    return folder


def said(base, adapter):
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval())


def randomize(model):
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("bone_block", "miss_block", "lora_")):
                parameter.copy_(torch.randn_like(parameter) / 8)


def in_dtype(folder, dtype):
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)


def source(kind, base, folder, variant, r, dtype=torch.float32):
    """An adapter of the given format, made by PEFT's own classes where there are any."""
    if kind == "lora":
        source("peft-bone", base, folder / "bone", variant, r, dtype)
        bonetune.convert(str(folder / "bone"), str(folder / "lora"), to="lora", base=str(base))
        return folder / "lora"
    targets = ["q_proj", "k_proj", "up_proj", "down_proj"]
    config = (
        MissConfig(r=r, init_weights=MISS[variant], mini_r=2, target_modules=targets)
        if kind == "miss"
        else BoneConfig(r=r, variant=variant, mini_r=2, target_modules=targets)
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    randomize(model)
    model.save_pretrained(folder)
    in_dtype(folder, dtype)
    if kind == "tensors":
        (folder / "adapter_config.json").rename(folder / "kept.json")
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "variant", "r"), [(kind, *which) for kind in FOLDERS for which in KINDS if can_hold(kind, which[0])]
)
def test_every_pair(tmp_path, base, kind, variant, r, dtype):
    adapter = source(kind, base, tmp_path / "adapter", variant, r, dtype)
    if kind == "tensors":
        shutil.copytree(adapter, tmp_path / "known")
        (tmp_path / "known" / "kept.json").rename(tmp_path / "known" / "adapter_config.json")
    expected = said(base, tmp_path / "known" if kind == "tensors" else adapter)
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.1
    for to in ("peft-bone", "miss", "lora"):
        if to == "miss" and not can_hold("miss", variant):
            with pytest.raises(bonetune.InputError, match=f"no variant {variant}"):
                bonetune.convert(str(adapter), str(tmp_path / to), to=to, variant=variant if kind == "tensors" else None)
            continue
        result = bonetune.convert(
            str(adapter),
            str(tmp_path / to),
            to=to,
            base=str(base),
            variant=variant if kind == "tensors" else None,
            rank=FULL if to == "lora" and variant.startswith("bat") else None,
            dtype="float32" if to == "lora" else "auto",  # factors of bfloat16 would be rounded
        )
        assert result.certificate.holds
        assert result.read_as == kind
        torch.testing.assert_close(said(base, tmp_path / to), expected, rtol=1e-4, atol=2e-5)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.att, self.ffn = nn.ModuleDict(), nn.ModuleDict()
        self.att["key"] = nn.Linear(24, 24, bias=False)
        self.ffn["key"] = nn.Linear(24, 40, bias=False)
        self.ffn["value"] = nn.Linear(40, 24, bias=False)

    def forward(self, x):
        return x + self.ffn["value"](torch.tanh(self.ffn["key"](self.att["key"](x))))


class Rwkv(nn.Module):
    """Linear layers of RWKV's names."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("variant", "r"), [("bone", 8), ("bone", 7), ("bat-row", 8)])
def test_rwkv_and_back(tmp_path, variant, r, dtype):
    x = torch.randn(6, 24)
    config = BoneConfig(r=r, variant=variant, target_modules=["blocks.0.att.key", "blocks.0.ffn.key", "blocks.1.ffn.value"])
    model = get_peft_model(Rwkv(), config)
    randomize(model)
    model.save_pretrained(tmp_path / "adapter")
    in_dtype(tmp_path / "adapter", dtype)

    def said(folder):
        with torch.no_grad():
            return PeftModel.from_pretrained(Rwkv(), folder).eval()(x)

    file = tmp_path / "rwkv-0.pth"
    assert bonetune.convert(str(tmp_path / "adapter"), str(file), to="rwkv-disha").certificate.holds
    assert {name.rpartition(".")[2] for name in torch.load(file, weights_only=True)} == {"disha"}
    for to in ("peft-bone", *(["miss"] if variant == "bone" else [])):
        result = bonetune.convert(str(file), str(tmp_path / to), to=to)
        assert (result.read_as, result.certificate.holds) == ("rwkv-disha", True)
        torch.testing.assert_close(said(tmp_path / to), said(tmp_path / "adapter"), rtol=1e-5, atol=1e-6)
    with pytest.raises(bonetune.InputError, match="names no base model: pass --base"):
        bonetune.convert(str(file), str(tmp_path / "lora"), to="lora")


def test_the_matrix_has_every_reader():
    assert {*FOLDERS, "rwkv-disha"} == set(READERS)


def test_a_lora_that_is_no_bone_is_refused(tmp_path, base):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "lora")
    with pytest.raises(bonetune.AdapterFileError, match="is not the repeated identity"):
        bonetune.convert(str(tmp_path / "lora"), str(tmp_path / "out"), to="peft-bone")
    assert not (tmp_path / "out").exists()


def test_a_file_of_november_2024_is_bat(tmp_path, base):
    adapter = source("peft-bone", base, tmp_path / "adapter", "bat", 4)
    expected = said(base, adapter)
    content = json.loads((adapter / "adapter_config.json").read_text())
    del content["variant"]
    content["init_weights"] = True
    (adapter / "adapter_config.json").write_text(json.dumps(content))
    result = bonetune.convert(str(adapter), str(tmp_path / "miss"), to="miss")
    assert result.variant == "bat"
    assert any("November 2024" in note for note in result.notes)
    torch.testing.assert_close(said(base, tmp_path / "miss"), expected, rtol=1e-5, atol=1e-5)
