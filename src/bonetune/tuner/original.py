"""What a base layer held before a merge, so that unmerging restores it bit for bit."""

from typing import Any

import torch
from torch import Tensor, nn

# What a backend writes to on a layer that it quantizes again: bitsandbytes the first two, torchao the last.
_TOUCHED = ("state", "quant_state", "extra_repr")


class Original:
    """The base layer's own weight, as it was: the very Parameter, and with it any tie to another layer's.

    Of a quantized layer the codes are kept, on their device, with everything that belongs to them and is written to in place,
    and the layer itself, in whose place another one may be put (HQQ). The values that the codes stand for are kept besides,
    because further merges start from them.

    Args:
        module: the base layer.
        name: its weight's name.
        weight: the values that merging started from: the stored weight, or the dequantized one.
    """

    def __init__(self, module: nn.Module, name: str, weight: Tensor) -> None:
        self.module, self.name = module, name
        self.parameter: Any = getattr(module, name, None)  # HQQ's codes have another name
        self.dequantized = None if weight is self.parameter else weight
        self._attributes = {key: vars(module)[key] for key in _TOUCHED if key in vars(module)}
        owners = [self._attributes.get(key) for key in ("state", "quant_state")]
        owners.append(getattr(self.parameter, "quant_state", None))
        if type(self.parameter) is not nn.Parameter:
            owners.append(self.parameter)
        self._contents = [(owner, dict(vars(owner))) for owner in owners if hasattr(owner, "__dict__")]

    @property
    def weight(self) -> Tensor:
        """The values that merging started from."""
        return self.parameter if self.dequantized is None else self.dequantized

    def move_to_host(self) -> None:
        """Keep the values in host memory. Not for a Parameter that another layer uses too."""
        if self.dequantized is None:
            _move(self.parameter, torch.device("cpu"))
        else:
            self.dequantized = self.dequantized.to("cpu")

    def restore(self, layer: Any) -> None:
        """Put everything back under the tuner layer, in the dtype and on the device that the merged weight has by now."""
        module = layer.get_base_layer()
        if self.dequantized is not None:
            self._restore_codes(layer, getattr(module, self.name, None))
            return
        now = getattr(module, self.name)
        _move(self.parameter, now.device, now.dtype)  # in place: another layer may be tied to it
        setattr(module, self.name, self.parameter)

    def _restore_codes(self, layer: Any, now: Tensor | None) -> None:
        if layer.get_base_layer() is not self.module:
            layer.base_layer = self.module
        for key in _TOUCHED:
            vars(self.module).pop(key, None)
        vars(self.module).update(self._attributes)
        for owner, content in self._contents:
            vars(owner).clear()
            vars(owner).update(content)
        if self.parameter is not None:
            setattr(self.module, self.name, self.parameter)
            if now is not None and self.parameter.device not in (now.device, torch.device("meta")):
                self.module.to(now.device)


def put_weight(module: nn.Module, name: str, weight: Tensor) -> None:
    """Give the layer another weight; the Parameter it had is not written to, for another layer may be tied to it."""
    setattr(module, name, nn.Parameter(weight, requires_grad=bool(getattr(module, name).requires_grad)))


def _move(parameter: nn.Parameter, device: torch.device, dtype: torch.dtype | None = None) -> None:
    if parameter.device.type != "meta" and (parameter.device, parameter.dtype) != (device, dtype or parameter.dtype):
        parameter.data = parameter.data.to(device, dtype)
