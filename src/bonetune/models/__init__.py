"""From a name or path to a model with its tokenizer."""

from bonetune.models.greedy import end_tokens, greedy
from bonetune.models.resolve import Loaded, load_base, load_model, parse_dtype
from bonetune.models.smollm import smollm2

__all__ = ["Loaded", "end_tokens", "greedy", "load_base", "load_model", "parse_dtype", "smollm2"]
