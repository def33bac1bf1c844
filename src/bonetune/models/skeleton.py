"""A model without weights: its structure, from its configuration alone."""

from typing import Any

import torch
from torch import Tensor, nn

from bonetune.errors import InputError, first_line
from bonetune.models.resolve import AUTO_CLASSES, check_name, check_rwkv, parse_dtype
from bonetune.rwkv.weights import is_pth, read_config_of

# Elements that share one scale, and bytes of an element, in each quantization.
_CODES = {"nf4": (64, 0.5), "fp4": (64, 0.5), "int8": (None, 1.0), "torchao-int8": (None, 1.0), "torchao-int4": (32, 1.0)}
# Scales that share one scale of their own, with double quantization.
_NESTED = 256


def skeleton(
    name: str,
    dtype: str = "auto",
    *,
    task_type: str = "CAUSAL_LM",
    quantization: str | None = None,
    double_quantization: bool = False,
    attn_implementation: str = "auto",
    trust_remote_code: bool = False,
    num_labels: int | None = None,
    initial_state: bool = False,
) -> Any:
    """The model that `load_base` would load, with its parameters on the meta device.

    Args:
        name, dtype, task_type, quantization, double_quantization, attn_implementation, trust_remote_code, initial_state: as
            `load_base`.
        num_labels: SEQ_CLS: number of classes; None: the checkpoint's.

    Raises:
        InputError: there is no such model.
    """
    import transformers
    from accelerate import init_empty_weights

    check_name(name)
    wanted = parse_dtype(dtype)
    options = {} if attn_implementation == "auto" else {"attn_implementation": attn_implementation}
    try:
        if is_pth(name):
            check_rwkv(name, task_type, attn_implementation)
            config: Any = read_config_of(name)
        else:
            config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        if initial_state:
            config.initial_state = True
        if num_labels is not None:
            config.num_labels = num_labels
        dtype_of_weights = (config.dtype or torch.float32) if wanted == "auto" else wanted
        with init_empty_weights(include_buffers=False):
            model = getattr(transformers, AUTO_CLASSES[task_type]).from_config(
                config, dtype=dtype_of_weights, trust_remote_code=trust_remote_code, **options
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"Model {name!r} cannot be built for {task_type}: {first_line(error)}") from error
    model.tie_weights()
    if quantization is not None:
        _quantize(model, quantization, double_quantization)
    return model


def _quantize(model: Any, quantization: str, double_quantization: bool) -> None:
    group, width = _CODES[quantization]
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if type(child) is nn.Linear and child is not head:
                parent._modules[name] = _CodedLinear(child, group, width, double_quantization and width < 1)


class _CodedLinear(nn.Linear):
    """A Linear whose weight is kept as codes and scales, and made anew for each product."""

    def __init__(self, linear: nn.Linear, group: int | None, width: float, nested: bool) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias, self._like = linear.bias, (linear.weight.shape, linear.weight.dtype)
        elements = linear.weight.numel()
        scales = self.out_features if group is None else -(-elements // group)
        size = scales + 4 * -(-scales // _NESTED) if nested else 4 * scales
        self.codes = _stored(int(elements * width))
        self.scales = _stored(size)

    @property
    def weight(self) -> Tensor:
        shape, dtype = self._like
        return torch.empty(shape, dtype=dtype, device=self.codes.device)

    def forward(self, x: Tensor) -> Tensor:
        y = _CodedProduct.apply(x, self)
        return y if self.bias is None else y + self.bias


class _CodedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: _CodedLinear) -> Tensor:
        ctx.layer = layer
        return x @ layer.weight.to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy @ ctx.layer.weight.to(dy.dtype), None


def _stored(size: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), requires_grad=False)
