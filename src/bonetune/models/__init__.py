"""From a name or path to a model with its tokenizer."""

from bonetune.models.compilation import compiled_layers
from bonetune.models.generation import Answer, cut, generate, generate_batches, input_tokens
from bonetune.models.greedy import decode, end_tokens, greedy
from bonetune.models.packed_attention import packed_attention, packing_obstacle
from bonetune.models.resolve import (
    AUTO_CLASSES,
    CLASSIFIERS_HEADS,
    Loaded,
    check_trust,
    load_base,
    load_model,
    load_tokenizer,
    parse_dtype,
    task_type_of,
)
from bonetune.models.skeleton import skeleton
from bonetune.models.smollm import smollm2

__all__ = [
    "AUTO_CLASSES",
    "CLASSIFIERS_HEADS",
    "Answer",
    "Loaded",
    "check_trust",
    "compiled_layers",
    "cut",
    "decode",
    "end_tokens",
    "generate",
    "generate_batches",
    "greedy",
    "input_tokens",
    "load_base",
    "load_model",
    "load_tokenizer",
    "packed_attention",
    "packing_obstacle",
    "parse_dtype",
    "skeleton",
    "smollm2",
    "task_type_of",
]
