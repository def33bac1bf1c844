"""Fine-tune a causal language model with Bone through PEFT and TRL: python examples/finetune.py MODEL OUTPUT."""

import sys

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from bonetune import BoneConfig

model, output = sys.argv[1:3]
questions = Dataset.from_list([{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(64)])
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(output_dir=output, learning_rate=4e-4, max_steps=8, logging_steps=1, report_to="none", bf16=False),
    train_dataset=questions,
    peft_config=BoneConfig(r=16, variant="bat-row", target_modules="all-linear"),
)
trainer.train()
trainer.save_model(output)
trainer.model.merge_and_unload().save_pretrained(f"{output}/merged")
