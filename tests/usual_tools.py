"""What people use without bonetune, on the tiny Llama: transformers' Trainer with PEFT's LoRA."""

import processes
import torch
from conftest import llama
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def lora(base=None, trained=False, **changes):
    """A model with LoRA; if it is to look trained, with an update that is not zero."""
    base = base or llama()
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(**(LORA | changes)))
    if trained:
        update(model)
    return model


def update(model, adapter="default"):
    for name, parameter in model.named_parameters():
        if f"lora_B.{adapter}" in name:
            torch.nn.init.normal_(parameter, std=0.1)


def example(ids, labels=None):
    """A row as Trainer takes it; everything is supervised if nothing is said."""
    return {"input_ids": list(ids), "attention_mask": [1] * len(ids), "labels": list(ids) if labels is None else list(labels)}


def trainer(folder, rows, model=None, kind=Trainer, more=None, **arguments):
    """A Trainer that takes `rows` by twos and logs each step."""
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "max_steps": 3,
    }
    return kind(model=model or lora(), args=TrainingArguments(**(settings | arguments)), train_dataset=rows, **(more or {}))


def losses(trained):
    return {line["step"]: line["loss"] for line in trained.state.log_history if "loss" in line}


def train_until_the_disk_is_full(folder, rows, steps):
    """Train and save each other step; from step `steps` on, no file can grow."""

    class Full(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == steps:
                processes.fill_the_disk()

    run = trainer(folder, rows, save_strategy="steps", save_steps=2, max_steps=6)
    run.add_callback(Full())
    run.train()
