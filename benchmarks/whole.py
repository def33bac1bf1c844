"""The model that the parts share: SmolLM2-135M-Instruct in bfloat16, one set of frozen weights for all methods."""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from benchmarks.methods import adapt, named
from bonetune.models import load_base, smollm2

BATCH_SIZE, LENGTH = 4, 256
QUICK_LAYERS, QUICK_LENGTH = 2, 64
STEP_METHODS = (
    *("frozen", "lora", "miss (PEFT)", "bat (PEFT)", "bone", "bat-row", "bat-free", "bat-left", "bat"),
    *("lora bf16", "miss (PEFT) bf16", "bone bf16", "bat-row bf16", "bat bf16"),
)


def where(quick: bool) -> str:
    """The model and the batch, in words."""
    if quick:
        return f"the first {QUICK_LAYERS} layers of SmolLM2-135M, batch 1 x {QUICK_LENGTH}, bfloat16 base"
    return f"SmolLM2-135M, batch {BATCH_SIZE} x {LENGTH}, bfloat16 base"


def batch(quick: bool) -> dict[str, Any]:
    """Random tokens, all of them supervised but the first."""
    size = (1, QUICK_LENGTH) if quick else (BATCH_SIZE, LENGTH)
    ids = torch.randint(100, 49000, size, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def base(quick: bool) -> Any:
    """The model, in evaluation mode; if quick, only its first layers."""
    model = load_base(smollm2(), "bfloat16").model
    if quick:
        model.model.layers = model.model.layers[:QUICK_LAYERS]
        model.config.num_hidden_layers = QUICK_LAYERS
    return model


def sharing(model: Any) -> Any:
    """Another model with the very same parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def prepared(names: Iterable[str], quick: bool) -> Iterator[tuple[str, Any]]:
    """Each method's model in training mode. In all of them, the frozen one too, gradients flow down to the embeddings."""
    model = base(quick)
    for name, method in named(names).items():
        torch.manual_seed(0)
        copied = sharing(model)
        copied.enable_input_require_grads()
        yield name, adapt(copied, method, task_type="CAUSAL_LM").train()
