"""One adapted Linear against the frozen one: all methods in one process, round by round, so that drift hits all alike."""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import LoraConfig, MissConfig, get_peft_model
from torch import Tensor, nn

from bonetune import VARIANTS, BoneConfig

SHAPES = [(576, 576, 1024), (2048, 2048, 1024), (576, 1536, 4096), (2048, 2048, 4096)]
R = 64


def methods(out: int, inp: int) -> dict[str, Any]:
    """PEFT configurations by name; None is the frozen layer. LoRA's rank gives bone's number of parameters, r * out."""
    target: dict[str, Any] = {"target_modules": ["0"]}
    return {
        "frozen": None,
        "lora": LoraConfig(r=max(1, round(R * out / (out + inp))), **target),
        "miss (PEFT)": MissConfig(r=R, **target),
        "bat (PEFT)": MissConfig(r=R, init_weights="bat", **target),
        **{name: BoneConfig(r=R, variant=name, mini_r=R, **target) for name in VARIANTS},
    }


def measure(out: int, inp: int, tokens: int, dtype: torch.dtype, rounds: int) -> Iterator[dict[str, Any]]:
    """For each method: CPU time of forward + backward over the frozen layer's, and the bytes kept for backward."""
    torch.manual_seed(0)
    x, dy = torch.randn(tokens, inp, dtype=dtype), torch.randn(tokens, out, dtype=dtype)
    steps: dict[str, Callable[[], None]] = {}
    saved: dict[str, float] = {}
    for name, config in methods(out, inp).items():
        layer = nn.Sequential(nn.Linear(inp, out, bias=False)).to(dtype).requires_grad_(False)
        model = layer if config is None else get_peft_model(layer, config)
        steps[name] = _step(model, x, dy)
        saved[name] = _saved_bytes(model, x) / 2**20
        steps[name]()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            began = time.process_time()
            step()
            times[name].append(time.process_time() - began)
    for name, seconds in times.items():
        ratios = [mine / frozen for mine, frozen in zip(seconds, times["frozen"], strict=True)]
        yield {
            "out": out,
            "in": inp,
            "tokens": tokens,
            "dtype": str(dtype).removeprefix("torch."),
            "method": name,
            "ratio": statistics.median(ratios),
            "range": (min(ratios), max(ratios)),
            "saved_mib": saved[name],
        }


def _step(model: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    trainable = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        leaf = x.detach().requires_grad_()
        torch.autograd.grad(model(leaf), [leaf, *trainable], dy)

    return step


def _saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of the storages kept for backward, the layer's input and the parameters left out."""
    leaf = x.detach().requires_grad_()
    given = {leaf.untyped_storage().data_ptr(), *(p.untyped_storage().data_ptr() for p in model.parameters())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held = model(leaf)
    del held
    return sum(kept.values())
