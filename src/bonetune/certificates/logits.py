"""Whether two models say the same: compared on prompts, along the first one's own greedy answers."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bonetune.models import greedy, input_tokens

# By how much of the logits two equal models may differ, in root mean square: weights are rounded once, and both forwards
# round at every layer, to the coarser of the two's precisions. docs/guide.md has measurements.
TOLERANCE = {"float64": 1e-8, "float32": 1e-4, "float16": 0.01, "bfloat16": 0.05}
MIN_AGREEMENT = 0.9
# Share of the adapter's own effect on the logits that the error may amount to: a model without the update has 1.
MAX_SHARE_OF_EFFECT = 0.5


@dataclass(frozen=True)
class Witness:
    """What a model said: for each prompt its token ids and those of the greedy answer, (1, length), and the answer's logits.

    `without` holds the logits of the same tokens without the adapter, if there is one. `precision` is what its layers' products
    are rounded to, in the worst case: the dtype of its weights, or bfloat16 if they are quantized.
    """

    prompts: list[Tensor]
    answers: list[Tensor]
    logits: list[Tensor]
    without: list[Tensor] | None
    precision: str


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
        precision: what the coarser of the two models is computed in.
        tolerance: by how much of the logits they may differ, in root mean square; None is `TOLERANCE` of the precision.
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
    precision: str
    tolerance: float | None = None

    @property
    def holds(self) -> bool:
        """Whether the difference is no more than rounding explains, and well below what the adapter does.

        The witness's logits are not all zero, as those of a broken model may be. The difference is at most the tolerance's
        part of them, at most `MAX_SHARE_OF_EFFECT` of the adapter's effect, and greedy choices agree but for near ties
        (`MIN_AGREEMENT`).
        """
        near = self.size > 0 and self.error <= self._allowed * self.size
        told_apart = self.effect is None or self.error <= MAX_SHARE_OF_EFFECT * self.effect
        return near and told_apart and self.greedy_agreement >= MIN_AGREEMENT

    def to_dict(self) -> dict[str, Any]:
        """As certificate.json holds it."""
        return {"method": "logits", **asdict(self), "tolerance": self._allowed, "holds": self.holds}

    @property
    def _allowed(self) -> float:
        return TOLERANCE[self.precision] if self.tolerance is None else self.tolerance

    def __str__(self) -> str:
        verdict = "equal" if self.holds else "NOT equal"
        effect = "" if self.effect is None else f" (the adapter's effect: {self.effect:.3g})"
        return (
            f"{verdict} up to rounding ({self.precision}): logits of size {self.size:.3g} differ by {self.error:.3g}{effect}, "
            f"at most by {self.largest_logit_difference:.3g} (largest logit {self.largest_logit:.3g}); KL {self.mean_kl:.2g} "
            f"nats, greedy agreement {100 * self.greedy_agreement:.1f}% of {self.tokens} tokens after {self.prompts} prompts"
        )


@torch.inference_mode()
def witness(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int = 24) -> Witness:
    """Let `model` answer `prompts` greedily, one by one; keep the logits behind each token, or those of a classifier."""
    given, answers, logits, without = [], [], [], []
    has_adapter = hasattr(model, "disable_adapter")
    for prompt in prompts:
        ids = torch.tensor([input_tokens(model, tokenizer, prompt)], device=model.device)
        answer = _answer(model, tokenizer, ids, max_new_tokens)
        given.append(ids.cpu())
        answers.append(answer.cpu())
        logits.append(_answer_logits(model, ids, answer))
        with model.disable_adapter() if has_adapter else nullcontext():
            without.append(_answer_logits(model, ids, answer))
    # the products of quantized layers are in bfloat16, or of inputs that are rounded to as few bits
    precision = "bfloat16" if getattr(model, "is_quantized", False) else _dtype(model)
    return Witness(given, answers, logits, without if has_adapter else None, precision)


@torch.inference_mode()
def certify(model: Any, expected: Witness, tolerance: float | None = None) -> Certificate:
    """Compare `model` with the witness, token by token, on the witness's own answers; `tolerance` as in `Certificate`."""
    pairs = zip(expected.prompts, expected.answers, strict=True)
    got = torch.cat([_answer_logits(model, prompt.to(model.device), answer.to(model.device)) for prompt, answer in pairs])
    wanted = torch.cat(expected.logits)
    dtype = _dtype(model)
    finite = bool(torch.isfinite(got).all() and torch.isfinite(wanted).all())
    kl = torch.nn.functional.kl_div(got.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="sum")
    return Certificate(
        prompts=len(expected.prompts),
        tokens=len(wanted),
        largest_logit_difference=(got - wanted).abs().max().item() if finite else math.inf,
        largest_logit=wanted.abs().max().item() if finite else math.inf,
        error=_rms(got - wanted) if finite else math.inf,
        size=_rms(wanted),
        effect=None if expected.without is None else _rms(torch.cat(expected.without) - wanted),
        mean_kl=kl.item() / len(wanted) if finite else math.inf,
        greedy_agreement=(got.argmax(-1) == wanted.argmax(-1)).double().mean().item() if finite else 0.0,
        dtype=dtype,
        precision=max(dtype, expected.precision, key=lambda name: TOLERANCE[name]),
        tolerance=tolerance,
    )


def _dtype(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def _rms(tensor: Tensor) -> float:
    return tensor.double().square().mean().sqrt().item()


def _answer(model: Any, tokenizer: Any, prompt: Tensor, max_new_tokens: int) -> Tensor:
    """The greedy answer, (1, answer length): with the token it begins with, of an encoder-decoder; empty, of a classifier."""
    if not model.can_generate():
        return prompt[:, :0]
    out = greedy(model, tokenizer, prompt, torch.ones_like(prompt), max_new_tokens)
    return out if model.config.is_encoder_decoder else out[:, prompt.shape[1] :]


def _answer_logits(model: Any, prompt: Tensor, answer: Tensor) -> Tensor:
    """Behind each token of the answer, (answer length, vocabulary); of a classifier (1, classes). float32, on the CPU."""
    if not model.can_generate():
        logits = model(input_ids=prompt).logits
    elif model.config.is_encoder_decoder:
        logits = model(input_ids=prompt, decoder_input_ids=answer, use_cache=False).logits[0, :-1]
    else:
        logits = model(input_ids=torch.cat([prompt, answer], 1), use_cache=False).logits[0, prompt.shape[1] - 1 : -1]
    return logits.float().cpu()
