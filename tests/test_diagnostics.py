import pytest
import torch

from bonetune.diagnostics import lacks_instructions_for


@pytest.mark.parametrize("supported", [True, False])
@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_a_narrow_dtype_is_as_fast_as_the_cpu_has_instructions_for_it(monkeypatch, name, supported):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda: supported)
    assert lacks_instructions_for({"bf16": torch.bfloat16, "fp16": torch.float16}[name]) is not supported
    assert not lacks_instructions_for(torch.float32)


def test_with_an_accelerator_the_cpu_is_of_no_account(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert not lacks_instructions_for(torch.bfloat16)
