"""The ways in that transformers and TRL offer, with nothing but `import bonetune` before them."""

import json

import pytest
import torch
from adapted_models import IDS, adapted, config, logits
from conftest import llama

from bonetune import VARIANTS, BoneConfig, BoneLayer


@pytest.mark.parametrize("variant", VARIANTS)
def test_add_save_load_delete_adapter(tmp_path, variant):
    model = llama()
    base = logits(model)
    torch.manual_seed(0)
    model.add_adapter(config(variant), "mine")
    expected = logits(model)
    assert (expected - base).abs().max() > 0.1
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["variant"] == variant

    again = llama()
    again.load_adapter(str(tmp_path), "mine")
    assert torch.equal(logits(again), expected)
    again.disable_adapters()
    assert torch.equal(logits(again), base)
    again.enable_adapters()
    assert torch.equal(logits(again), expected)
    again.delete_adapter("mine")
    assert torch.equal(logits(again), base)


def test_load_adapter_of_a_peft_model(tmp_path):
    model = adapted("bat-row", llama())
    model.save_pretrained(tmp_path)
    plain = llama()
    plain.load_adapter(str(tmp_path))
    assert torch.equal(logits(plain), logits(model))


@pytest.mark.filterwarnings("default")  # TRL and datasets have their own
@pytest.mark.parametrize("variant", ["bone", "bat", "bat-row", "bat-left"])
def test_trl_sft_trainer(tmp_path, model_folder, variant):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [{"prompt": "what is one plus two?", "completion": " three."}] * 4
    trainer = SFTTrainer(
        model=str(model_folder),
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            report_to="none",
            use_cpu=True,
            bf16=False,
            logging_steps=1,
        ),
        train_dataset=Dataset.from_list(rows),
        peft_config=BoneConfig(r=4, variant=variant, target_modules="all-linear"),
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    trained = [m for m in trainer.model.modules() if isinstance(m, BoneLayer)]
    assert trained
    assert all(layer.bone_block["default"].abs().sum() > 0 for layer in trained)
    trainer.save_model(str(tmp_path / "saved"))
    assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["variant"] == variant


@pytest.mark.parametrize("variant", VARIANTS)
def test_generate_with_and_without_cache(variant):
    model = adapted(variant, llama())
    settings = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(**settings, use_cache=True), model.generate(**settings, use_cache=False))
