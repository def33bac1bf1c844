"""Generation with unmerged adapters, batch 1: CPU time of a new token over LoRA's, of the whole model and of one layer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from benchmarks.methods import adapt, named, randomize
from benchmarks.results import Result, markdown
from benchmarks.timing import interleaved, ratio
from benchmarks.whole import base, sharing
from bonetune import VARIANTS

PLAIN = "merged or plain"
NAMES = ("frozen", "lora", "miss (PEFT)", "bat (PEFT)", *VARIANTS)
PROMPT, NEW, QUICK_NEW = 32, 32, 8
# PEFT's BAT builds the float32 W' of every layer again for each token: fewer of them, as it takes long.
NEW_OF = {"bat (PEFT)": 4}
SIDE = 1024


def run(rounds: int, quick: bool) -> Result:
    """Both tables' rows, in one."""
    model, layer = _model_seconds(rounds, quick), _layer_seconds(rounds)
    rows: list[dict[str, Any]] = []
    lines: list[list[str]] = []
    for name in model:
        shown = PLAIN if name == "frozen" else name
        ratios = [ratio(times[name], times["lora"]) for times in (model, layer)]
        for what, times, over in zip(("token", "layer"), (model, layer), ratios, strict=True):
            rows.append({"method": shown, "what": what, "over": "lora", **vars(over), "seconds": times[name]})
        lines.append([shown, *map(str, ratios)])
    few = " ".join(f"For {name} {tokens} instead of {_new(quick)} tokens are generated." for name, tokens in NEW_OF.items())
    caption = (
        f"Generation, batch 1, unmerged float32 adapters on a bfloat16 base, CPU time over LoRA's; median [lowest, highest]. "
        f"`token`: a new token of SmolLM2-135M{' cut to its first layers' if quick else ''}, {_new(quick)} of them after a "
        f"prompt of {PROMPT}, with its share in the prompt's time. {few} `layer`: one call of one {SIDE} x {SIDE} layer."
    )
    return Result(rows, f"{caption}\n\n{markdown(['method', 'token', 'layer'], lines)}")


def _new(quick: bool) -> int:
    return QUICK_NEW if quick else NEW


def _model_seconds(rounds: int, quick: bool) -> dict[str, list[float]]:
    """CPU seconds a new token."""
    origin = base(quick)
    # no end token: every method generates as many tokens as it is told
    origin.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    ids = torch.randint(100, 49000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    new = {name: NEW_OF.get(name, _new(quick)) for name in NAMES}
    steps: dict[str, Callable[[], None]] = {}
    for name, method in named(NAMES).items():
        torch.manual_seed(0)
        model = randomize(adapt(sharing(origin), method, task_type="CAUSAL_LM").eval())
        steps[name] = _generate(model, ids, new[name])
    seconds = interleaved(steps, rounds)
    return {name: [sample / new[name] for sample in samples] for name, samples in seconds.items()}


def _generate(model: Any, ids: torch.Tensor, new: int) -> Callable[[], None]:
    @torch.inference_mode()
    def generate() -> None:
        answer = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), min_new_tokens=new, max_new_tokens=new)
        assert answer.shape[1] == PROMPT + new

    return generate


def _layer_seconds(rounds: int) -> dict[str, list[float]]:
    """CPU seconds a call with one token."""
    torch.manual_seed(0)
    x = torch.randn(1, 1, SIDE, dtype=torch.bfloat16)
    steps: dict[str, Callable[[], None]] = {}
    for name, method in named(NAMES).items():
        layer = nn.Sequential(nn.Linear(SIDE, SIDE, bias=False)).to(torch.bfloat16)
        steps[name] = _call(randomize(adapt(layer, method).eval()), x)
    return interleaved(steps, rounds)


def _call(model: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    @torch.inference_mode()
    def call() -> None:
        model(x)

    return call
