"""`convert --to gguf-lora` and `--to gguf`; what is in such files is tested in tests/formats."""

import json

import gguf
import pytest
import torch
from adapted_models import config, logits
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import bonetune
from bonetune.errors import InputError, RunError
from bonetune.formats import gguf_layout, gguf_lora


@pytest.fixture
def adapter(tmp_path, model_folder):
    torch.manual_seed(0)
    settings = config(target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), settings).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(("dtype", "kind"), [("auto", "F32"), ("float16", "F16")])
def test_an_adapter(tmp_path, adapter, dtype, kind):
    result = bonetune.convert(str(adapter), str(tmp_path / "a.gguf"), to="gguf-lora", dtype=dtype)
    assert result.certificate.holds
    assert {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors} == {kind}
    report = json.loads((tmp_path / "a.gguf.conversion.json").read_text())
    assert report["layers"]["model.layers.0.self_attn.q_proj"]["rank"] == 4
    assert set(report["certificate"]["files"]) == {"a.gguf"}


@pytest.mark.parametrize("head", [True, False])
def test_the_order_of_rows_is_in_the_certificate(tmp_path, adapter, monkeypatch, head):
    """Rows of q that are not turned, or scaled otherwise: the file is not the adapter."""
    if head:
        right = gguf_layout.Layout.rows
        monkeypatch.setattr(
            gguf_layout.Layout, "rows", lambda self, name, x, back=False: right(self, name, x, back=True) if back else x
        )
    else:
        monkeypatch.setattr(gguf_lora, "encoded", lambda name, x, numbers: gguf_layout.encoded(name, 1.01 * x, numbers))
    with pytest.raises(RunError, match="NOT equal within 1e-05"):
        bonetune.convert(str(adapter), str(tmp_path / "a.gguf"), to="gguf-lora")
    assert not (tmp_path / "a.gguf").exists()
    assert {path.name for path in tmp_path.glob("*rejected*")} == {
        "a.gguf.rejected",
        "a.gguf.rejected.certificate.json",
        "a.gguf.rejected.conversion.json",
    }


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "q8_0"])
def test_a_merged_model(tmp_path, adapter, model_folder, dtype):
    bonetune.merge(str(adapter), str(tmp_path / "merged"))
    result = bonetune.convert(str(tmp_path / "merged"), str(tmp_path / "m.gguf"), to="gguf", dtype=dtype)
    assert result.certificate.holds
    assert result.certificate.weights == len(list(AutoModelForCausalLM.from_pretrained(model_folder).parameters()))
    assert (tmp_path / "m.gguf.Modelfile").read_text().startswith("FROM ./m.gguf\n")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    tolerance = {"auto": 1e-4, "bfloat16": 0.1, "q8_0": 0.1}[dtype]
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(logits(model), expected, rtol=tolerance, atol=tolerance)


def test_a_model_is_not_an_adapter(tmp_path, adapter, model_folder):
    with pytest.raises(InputError, match=r"is an adapter: merge it \(bonetune merge\), or convert it to gguf-lora"):
        bonetune.convert(str(adapter), str(tmp_path / "m.gguf"), to="gguf")
    with pytest.raises(InputError, match="holds no adapter"):
        bonetune.convert(str(model_folder), str(tmp_path / "a.gguf"), to="gguf-lora")
    with pytest.raises(InputError, match="for gguf"):
        bonetune.convert(str(model_folder), str(tmp_path / "m.gguf"), to="gguf", variant="bat")


def test_wrong_weights_are_found(tmp_path, model_folder, monkeypatch):
    from bonetune.formats import gguf_model

    def wrong(name, x, numbers):
        return gguf_layout.encoded(name, x * 1.001 if "down_proj" in name else x, numbers)

    monkeypatch.setattr(gguf_model, "encoded", wrong)
    with pytest.raises(RunError, match="NOT equal: 2 of 21 weights differ"):
        bonetune.convert(str(model_folder), str(tmp_path / "m.gguf"), to="gguf")
