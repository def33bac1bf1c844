"""What goes wrong elsewhere with adapters of other tools and times, shown first, and that it does not here."""

import json
import subprocess
import sys

import torch
from conftest import llama
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

import bonetune
from bonetune import BoneConfig

# Run where nothing but PEFT is imported.
WITH_PEFT_ALONE = """
import sys
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

base, old, converted, result = sys.argv[1:]
try:
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), old)
except KeyError as error:
    assert error.args == ("BONE",), error
else:
    raise AssertionError("PEFT has a Bone of its own")
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), converted).eval()
with torch.no_grad():
    save_file({"logits": model(torch.arange(12)[None]).logits}, result)
assert "bonetune" not in sys.modules
"""


def test_an_adapter_of_an_older_peft_does_not_load(tmp_path, model_folder):
    torch.manual_seed(0)
    model = get_peft_model(llama(), BoneConfig(r=4, init_weights="bat", target_modules=["q_proj", "up_proj"]))
    for name, parameter in model.named_parameters():
        if "bone_block" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "old")
    config = json.loads((tmp_path / "old" / "adapter_config.json").read_text())
    del config["variant"]  # as PEFT 0.18 wrote it
    (tmp_path / "old" / "adapter_config.json").write_text(json.dumps(config))

    conversion = bonetune.convert(str(tmp_path / "old"), str(tmp_path / "miss"), to="miss")
    assert conversion.certificate.holds
    assert (conversion.read_as, conversion.variant, len(conversion.layers)) == ("peft-bone", "bat", 4)
    assert json.loads((tmp_path / "miss" / "conversion.json").read_text())["layers"].keys() == conversion.layers.keys()
    paths = map(str, (model_folder, tmp_path / "old", tmp_path / "miss", tmp_path / "result.safetensors"))
    done = subprocess.run([sys.executable, "-c", WITH_PEFT_ALONE, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    got = load_file(tmp_path / "result.safetensors")["logits"]

    ours = PeftModel.from_pretrained(llama(), tmp_path / "old").eval()
    with torch.no_grad():
        expected, without = ours(torch.arange(12)[None]).logits, llama()(torch.arange(12)[None]).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert (expected - without).abs().max() > 0.01
