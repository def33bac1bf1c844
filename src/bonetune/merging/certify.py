"""Whether two models say the same: compared on prompts, along the first one's own greedy answers."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bonetune.data import prompt_tokens
from bonetune.models import greedy

# By how much of the logits two equal models may differ, in root mean square: weights are rounded once, and both forwards
# round at every layer. docs/guide.md has measurements.
TOLERANCE = {"float64": 1e-8, "float32": 1e-4, "float16": 0.01, "bfloat16": 0.05}
MIN_AGREEMENT = 0.9
# Share of the adapter's own effect on the logits that the error may amount to: a model without the update has 1.
MAX_SHARE_OF_EFFECT = 0.5


@dataclass(frozen=True)
class Witness:
    """What a model said: for each prompt the token ids of prompt and greedy answer, and the logits of the answer's tokens.

    `without` holds the logits of the same tokens without the adapter, if there is one.
    """

    sequences: list[Tensor]
    prompt_lengths: list[int]
    logits: list[Tensor]
    without: list[Tensor] | None


@dataclass(frozen=True)
class Certificate:
    """How far a model is from the witness.

    Args:
        prompts: number of prompts.
        tokens: number of answer tokens compared.
        largest_logit_difference: over all of them and the whole vocabulary; infinite if either side is not finite.
        largest_logit: the witness's largest absolute logit, to compare that with.
        error: root mean square of the logit differences.
        size: root mean square of the witness's logits.
        effect: root mean square of what the adapter changed in the logits; None if there was no adapter to leave away.
        mean_kl: mean Kullback-Leibler divergence KL(witness || model), in nats a token.
        greedy_agreement: share of the tokens at which both choose the same.
        dtype: of the model's weights.
    """

    prompts: int
    tokens: int
    largest_logit_difference: float
    largest_logit: float
    error: float
    size: float
    effect: float | None
    mean_kl: float
    greedy_agreement: float
    dtype: str

    @property
    def holds(self) -> bool:
        """Whether the difference is no more than rounding explains, and well below what the adapter does.

        At most `TOLERANCE` of the logits, at most `MAX_SHARE_OF_EFFECT` of the adapter's effect, and greedy choices
        that agree but for near ties (`MIN_AGREEMENT`).
        """
        near = self.error <= TOLERANCE[self.dtype] * self.size
        told_apart = self.effect is None or self.error <= MAX_SHARE_OF_EFFECT * self.effect
        return near and told_apart and self.greedy_agreement >= MIN_AGREEMENT

    def to_dict(self) -> dict[str, Any]:
        """As certificate.json holds it."""
        return asdict(self) | {"holds": self.holds}

    def __str__(self) -> str:
        verdict = "equal" if self.holds else "NOT equal"
        effect = "" if self.effect is None else f" (the adapter's effect: {self.effect:.3g})"
        return (
            f"{verdict} up to rounding ({self.dtype}): logits of size {self.size:.3g} differ by {self.error:.3g}{effect}, "
            f"at most by {self.largest_logit_difference:.3g} (largest logit {self.largest_logit:.3g}); KL {self.mean_kl:.2g} "
            f"nats, greedy agreement {100 * self.greedy_agreement:.1f}% of {self.tokens} tokens after {self.prompts} prompts"
        )


@torch.inference_mode()
def witness(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int = 24) -> Witness:
    """Let `model` answer `prompts` greedily, one by one, and keep the logits behind each token."""
    sequences, lengths, logits, without = [], [], [], []
    has_adapter = hasattr(model, "disable_adapter")
    for prompt in prompts:
        ids = torch.tensor([prompt_tokens(tokenizer, prompt)], device=model.device)
        sequence = greedy(model, tokenizer, ids, torch.ones_like(ids), max_new_tokens)
        sequences.append(sequence.cpu())
        lengths.append(ids.shape[1])
        logits.append(_answer_logits(model, sequence, ids.shape[1]))
        with model.disable_adapter() if has_adapter else nullcontext():
            without.append(_answer_logits(model, sequence, ids.shape[1]))
    return Witness(sequences, lengths, logits, without if has_adapter else None)


@torch.inference_mode()
def certify(model: Any, expected: Witness) -> Certificate:
    """Compare `model` with the witness, token by token, on the witness's own sequences."""
    pairs = zip(expected.sequences, expected.prompt_lengths, strict=True)
    got = torch.cat([_answer_logits(model, sequence.to(model.device), length) for sequence, length in pairs])
    wanted = torch.cat(expected.logits)
    finite = bool(torch.isfinite(got).all() and torch.isfinite(wanted).all())
    kl = torch.nn.functional.kl_div(got.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="sum")
    return Certificate(
        prompts=len(expected.sequences),
        tokens=len(wanted),
        largest_logit_difference=(got - wanted).abs().max().item() if finite else math.inf,
        largest_logit=wanted.abs().max().item() if finite else math.inf,
        error=_rms(got - wanted) if finite else math.inf,
        size=_rms(wanted),
        effect=None if expected.without is None else _rms(torch.cat(expected.without) - wanted),
        mean_kl=kl.item() / len(wanted) if finite else math.inf,
        greedy_agreement=(got.argmax(-1) == wanted.argmax(-1)).double().mean().item() if finite else 0.0,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
    )


def _rms(tensor: Tensor) -> float:
    return tensor.double().square().mean().sqrt().item()


def _answer_logits(model: Any, sequence: Tensor, prompt_length: int) -> Tensor:
    """Logits (answer length, vocabulary), float32, on the CPU."""
    return model(input_ids=sequence, use_cache=False).logits[0, prompt_length - 1 : -1].float().cpu()
