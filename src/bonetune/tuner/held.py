"""Parameters that others hold between a module's own forwards: accelerate's offloading, and FSDP2."""

from typing import Any

from torch import nn


def whole(module: nn.Module, name: str, value: Any) -> Any:
    """The parameter `value`, called `name` in `module`, with its values and with all of its shards; None stays None.

    For what is read without a call of the module that has it: an adapter's tensor, which is in a ParameterDict and so never
    called, and the base layer's weight and bias. Offloaded, they are meta tensors until the module's own forward; sharded by
    themselves, DTensors.
    """
    if value is None:
        return None
    if value.is_meta and (hook := _offloading(module)) is not None:
        return hook.weights_map[name].to(hook.execution_device, value.dtype)
    if hasattr(value, "full_tensor"):
        from torch.distributed.tensor import Partial

        # each process has the gradient of its own rows, and FSDP2's gradient is their mean
        return value.full_tensor(grad_placements=[Partial("avg")] * value.device_mesh.ndim)
    return value


def list_rightly(blocks: nn.ParameterDict, adapter_name: str) -> None:
    """Let accelerate find the tensor of an adapter that PEFT loaded over a base on disk.

    PEFT lists it as if it were in a module of the adapter's name: as `layer.default.bone_block`, where
    `layer.bone_block.default` will be asked for.
    """
    weights = getattr(_offloading(blocks), "weights_map", None)
    index = getattr(getattr(weights, "dataset", None), "index", None)
    if weights is None or index is None:
        return
    layer, _, block = weights.prefix.removesuffix(".").rpartition(".")
    listed, wanted = f"{layer}.{adapter_name}.{block}", f"{weights.prefix}{adapter_name}"
    if listed in index and wanted not in index:
        index[wanted] = index[listed]


def _offloading(module: nn.Module) -> Any:
    """accelerate's hook that keeps the module's parameters elsewhere, or None."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))  # it puts several into one
    return next((each for each in hooks if getattr(each, "offload", False)), None)
