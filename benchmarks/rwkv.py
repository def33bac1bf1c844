"""RWKV's operators by chunks over their recurrences, alone and in a training step; and what a step keeps by length."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor

from benchmarks.results import Result, markdown
from benchmarks.saved import saved_mib
from benchmarks.timing import interleaved, ratio
from bonetune import BoneConfig
from bonetune.losses import completion_loss
from bonetune.rwkv import RwkvConfig, RwkvForCausalLM, layers, wkv6, wkv7
from bonetune.rwkv.sequences import Sequences

_OPERATORS = {"x060": wkv6, "x070": wkv7}
_HEADS, _N = 8, 64


def run(rounds: int, quick: bool) -> Result:
    """Forward and backward of each operator, and of a model of six layers of width 512."""
    tokens = 256 if quick else 1024
    rows: list[dict[str, Any]] = []
    for version in _OPERATORS:
        for what, steps in (
            ("operator", _operator_steps(version, tokens)),
            ("step of bone, r = 64", _model_steps(version, tokens, adapted=True)),
            ("step of all weights", _model_steps(version, tokens, adapted=False)),
        ):
            seconds = interleaved(steps, rounds, shortest=0)
            over = ratio(seconds["by token"], seconds["by chunks"])
            rows.append({"version": version, "what": what, "tokens": tokens, **vars(over), "seconds": seconds})
    lines = [[row["version"], row["what"], f"{row['median']:.1f} [{row['lowest']:.1f}, {row['highest']:.1f}]"] for row in rows]
    caption = (
        f"RWKV, {tokens} tokens, float32, forward and backward: CPU time of the recurrence token by token over that by chunks; "
        f"median [lowest, highest]. The operator has {_HEADS} heads of {_N}; the steps are of six layers of width 512, where "
        "all but the operator is the same."
    )
    kept = [_kept(version, length) for version in _OPERATORS for length in (tokens // 4, tokens // 2, tokens)]
    memory = [[row["version"], str(row["tokens"]), f"{row['saved_mib']:.0f}", f"{row['kib_a_token']:.0f}"] for row in kept]
    times = markdown(["version", "what", "recurrence over chunks"], lines)
    sizes = markdown(["version", "tokens", "MiB", "KiB a token"], memory)
    return Result(rows + kept, f"{caption}\n\n{times}\n\nKept for backward by the step of bone.\n\n{sizes}")


def _inputs(version: str, tokens: int) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape)

    r, k, v = (draw(tokens, _HEADS, _N) for _ in range(3))
    state = draw(1, _HEADS, _N, _N)
    if version == "x060":
        return [r, k, v, -draw(tokens, _HEADS, _N).exp()], [draw(_HEADS, _N), state]
    kk = torch.nn.functional.normalize(draw(tokens, _HEADS, _N), dim=-1)
    decay = -0.6065 * draw(tokens, _HEADS, _N).sigmoid()
    return [r, k, v, decay, -kk, kk * draw(tokens, _HEADS, _N).sigmoid()], [state]


def _operator_steps(version: str, tokens: int) -> dict[str, Callable[[], None]]:
    rows, rest = _inputs(version, tokens)
    leaves = [tensor.requires_grad_() for tensor in (*rows, *rest)]
    operator: Any = _OPERATORS[version]
    sequences = Sequences((tokens,), torch.device("cpu"))
    ways = {
        "by token": lambda: operator.recurrence(*(row[None] for row in leaves[: len(rows)]), *leaves[len(rows) :]),
        "by chunks": lambda: operator.chunked(*leaves, sequences),
    }

    def step(way: Callable[[], tuple[Tensor, Tensor]]) -> None:
        y, _ = way()
        torch.autograd.grad(y.sum(), leaves, allow_unused=True)

    return {name: lambda way=way: step(way) for name, way in ways.items()}


def _model(version: str, adapted: bool) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 1024, "hidden_size": 512, "num_hidden_layers": 6, "head_size": _N}
    model = RwkvForCausalLM(RwkvConfig(version=version, **sizes))  # pyright: ignore[reportArgumentType]  (one of the two)
    return (get_peft_model(model, BoneConfig(r=64, target_modules="all-linear")) if adapted else model).train()


def _model_steps(version: str, tokens: int, adapted: bool) -> dict[str, Callable[[], None]]:
    model, ids = _model(version, adapted), torch.randint(1024, (1, tokens))

    def step() -> None:
        model.zero_grad()
        completion_loss(model, labels=ids, input_ids=ids).backward()

    def by_token() -> None:
        with _recurrences():
            step()

    return {"by token": by_token, "by chunks": step}


@contextmanager
def _recurrences() -> Iterator[None]:
    def recurrence(version: str, inputs: Any, u: Tensor | None, state: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor]:
        fixed = () if u is None else (u,)
        y, after = _OPERATORS[version].recurrence(*(x[None] for x in inputs), *fixed, state)
        return y[0], after

    before, layers.wkv = layers.wkv, recurrence
    try:
        yield
    finally:
        layers.wkv = before


def _kept(version: str, tokens: int) -> dict[str, Any]:
    model, ids = _model(version, adapted=True), torch.randint(1024, (1, tokens))
    mib = saved_mib(lambda: completion_loss(model, labels=ids, input_ids=ids), model.parameters())
    return {"version": version, "tokens": tokens, "saved_mib": mib, "kib_a_token": 1024 * mib / tokens}
