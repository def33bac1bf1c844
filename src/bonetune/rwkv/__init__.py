"""RWKV-6 (x060) and RWKV-7 (x070): their models in plain PyTorch, their files, their tokenizer. Knows no adapter.

Importing it makes the models known to transformers' Auto classes, for folders that `save_pretrained` wrote.
"""

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bonetune.rwkv.configuration import RwkvConfig
from bonetune.rwkv.model import RwkvForCausalLM, RwkvOutput, RwkvState
from bonetune.rwkv.parts import parameters_of
from bonetune.rwkv.tokenizer import WorldTokenizer
from bonetune.rwkv.weights import from_pth, save_pth

__all__ = [
    "RwkvConfig",
    "RwkvForCausalLM",
    "RwkvOutput",
    "RwkvState",
    "WorldTokenizer",
    "from_pth",
    "parameters_of",
    "save_pth",
]

AutoConfig.register(RwkvConfig.model_type, RwkvConfig, exist_ok=True)
AutoModelForCausalLM.register(RwkvConfig, RwkvForCausalLM, exist_ok=True)
AutoTokenizer.register(RwkvConfig, tokenizer_class=WorldTokenizer, exist_ok=True)
