"""RWKV's own files: one `.pth` (or safetensors) of a whole model, from whose tensors its sizes are read."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bonetune.errors import InputError, first_line
from bonetune.files import file_written_beside
from bonetune.rwkv.configuration import RwkvConfig
from bonetune.rwkv.model import RwkvForCausalLM
from bonetune.rwkv.sizes import config_of, skeleton_of
from bonetune.torch_files import Layout, map_tensors, write_one_by_one


def is_pth(name: str) -> bool:
    """Whether a model's name is that of an RWKV file, there or not."""
    return Path(name).suffix == ".pth" and not Path(name).is_dir()


def from_pth(
    path: str | Path,
    dtype: torch.dtype | str = torch.float32,
    *,
    initial_state: bool = False,
    quantization_config: Any = None,
) -> RwkvForCausalLM:
    """Load an RWKV-6 or RWKV-7 model from its file. Nothing in the file can run.

    Args:
        path: the `.pth` (or `.safetensors`) file.
        dtype: of the weights, or its name; `auto` keeps each tensor's.
        initial_state: give each block a state to begin with (`att.time_state`, zeros) if the file has none.
        quantization_config: as transformers' `from_pretrained` takes it, for the projections.

    Returns:
        the model in evaluation mode: `.forward(input_ids).logits`, `.generate`, and a `.state_dict()` with the file's names.

    Raises:
        InputError: there is no such file, it is torn, holds something else, or is of a version that does not run here.

    Example:
        >>> model = bonetune.rwkv.from_pth("RWKV-x070-World-0.1B.pth", dtype=torch.bfloat16)
        >>> model.generate(input_ids, max_new_tokens=20)
    """
    dtype = _parsed(dtype)
    tensors = _tensors(Path(path))
    config = read_config_of(path, tensors)
    if initial_state and not config.initial_state:
        config.initial_state = True
        for number in range(config.num_hidden_layers):
            tensors[f"blocks.{number}.att.time_state"] = torch.zeros(config.num_heads, config.head_size, config.head_size)
    if quantization_config is not None:
        options = {"dtype": dtype, "quantization_config": quantization_config}
        loaded: Any = RwkvForCausalLM.from_pretrained(None, config=config, state_dict=tensors, **options)
        model: RwkvForCausalLM = loaded
    else:
        model = skeleton_of(config)
        wanted = dtype if isinstance(dtype, torch.dtype) else None
        # of their own: what is mapped changes with the file
        values = {name: nn.Parameter(_own(tensor, wanted), requires_grad=False) for name, tensor in tensors.items()}
        model.load_state_dict(values, assign=True)
        model.config.dtype = wanted or tensors["blocks.0.att.receptance.weight"].dtype
    model.config._name_or_path = model.name_or_path = str(path)
    return model.requires_grad_(True).eval() if quantization_config is None else model.eval()


def read_config_of(path: str | Path, tensors: dict[str, Tensor] | None = None) -> RwkvConfig:
    """The sizes of the model in a file; errors as `from_pth`. `tensors`: the file's, if they are mapped already."""
    tensors = _tensors(Path(path)) if tensors is None else tensors
    bare = [name for name, tensor in tensors.items() if not tensor.is_floating_point()]
    if bare:
        raise InputError(f"{path} has {bare[0]} of {tensors[bare[0]].dtype} ({len(bare)} such): quantized files are not read.")
    return config_of({name: tensor.shape for name, tensor in tensors.items()}, str(path))


def save_pth(model: nn.Module, path: str | Path) -> None:
    """Write a model's `state_dict` as a `.pth` (or `.safetensors`), beside its place and then renamed.

    Args:
        model: an `RwkvForCausalLM`, without adapters.
        path: the file.

    Raises:
        InputError: another model, or quantized weights.
    """
    if not isinstance(model, RwkvForCausalLM):
        raise InputError(f"A {type(model).__name__} is no RWKV model without adapters: merge_and_unload gives one.")
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if codes := [name for name, tensor in state.items() if not tensor.is_floating_point()]:
        raise InputError(
            f"{codes[0]} is quantized ({len(codes)} such), and RWKV's files hold plain weights: dequantize it first."
        )
    with file_written_beside(Path(path)) as beside:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file({name: tensor.contiguous() for name, tensor in state.items()}, beside, metadata={"format": "pt"})
        else:
            layouts = {name: Layout(tensor.shape, tensor.dtype) for name, tensor in state.items()}
            write_one_by_one(beside, layouts, lambda name: state[name].cpu())


def _parsed(dtype: torch.dtype | str) -> torch.dtype | str:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype != "auto" else dtype
    if found != "auto" and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise InputError(f"Unknown dtype {dtype!r}: choose auto, float32, bfloat16, float16 or float64.")
    return found


def _tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix != ".safetensors":
        return map_tensors(path)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a whole safetensors file: {first_line(error)}") from error


def _own(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.clone() if dtype in (None, tensor.dtype) else tensor.to(dtype)
