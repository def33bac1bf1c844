"""The values that a new model's vectors begin with; RWKV-LM's are of this kind. Projections begin as transformers has them."""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from bonetune.rwkv.configuration import RwkvConfig
from bonetune.rwkv.layers import HeadsNorm, LayerNorm
from bonetune.rwkv.x060 import ChannelMixing6, TimeMixing6
from bonetune.rwkv.x070 import ChannelMixing7, TimeMixing7

_STD = 0.02


def initialize(module: nn.Module, config: RwkvConfig) -> None:
    """Fill the parameters that are the module's own, not its children's."""
    if isinstance(module, LayerNorm | HeadsNorm):
        init.ones_(module.weight)
        init.zeros_(module.bias)
    elif isinstance(module, TimeMixing6 | TimeMixing7 | ChannelMixing6 | ChannelMixing7):
        for name, parameter in module.named_parameters(recurse=False):
            _fill(name, parameter, config)


def _fill(name: str, parameter: Tensor, config: RwkvConfig) -> None:
    along = torch.linspace(0, 1, config.hidden_size).to(parameter)
    if name.startswith(("time_maa_", "x_")) and not name.endswith(("_w1", "_w2")):
        init.copy_(parameter, (1 - along**0.5).expand_as(parameter))  # later channels look back more
    elif name == "time_decay":
        init.copy_(parameter, (-6 + 5 * along).expand_as(parameter))
    elif name == "w0":
        init.copy_(parameter, (-6 + 6 * along).expand_as(parameter))
    elif name == "time_faaaa":
        init.copy_(parameter, (0.5 * (1 - along)).view_as(parameter))
    elif name == "v0":
        init.constant_(parameter, 1.0)
    elif name == "k_k":
        init.constant_(parameter, 0.85)
    elif name == "k_a":
        init.constant_(parameter, 1.0)
    elif (parameter.dim() == 2 and name != "r_k") or name == "time_maa_w2":
        init.normal_(parameter, std=_STD)
    else:
        init.zeros_(parameter)
