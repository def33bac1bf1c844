"""Whether two models say the same: compared on prompts, along the first one's own greedy answers."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

# Share of the largest logit by which two equal models may differ. Weights are rounded once, and both forwards round at
# every layer; measured on SmolLM2-135M (docs/guide.md) and left a factor of three.
TOLERANCE = {"float64": 1e-8, "float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}
MIN_AGREEMENT = 0.9


@dataclass(frozen=True)
class Witness:
    """What a model said: for each prompt the token ids of prompt and greedy answer, and the logits of the answer's tokens."""

    sequences: list[Tensor]
    prompt_lengths: list[int]
    logits: list[Tensor]


@dataclass(frozen=True)
class Certificate:
    """How far a model is from the witness.

    Args:
        prompts: number of prompts.
        tokens: number of answer tokens compared.
        largest_logit_difference: over all of them and the whole vocabulary.
        largest_logit: the witness's largest absolute logit, to compare that with.
        mean_kl: mean Kullback-Leibler divergence KL(witness || model), in nats a token.
        greedy_agreement: share of the tokens at which both choose the same.
        dtype: of the model's weights.
    """

    prompts: int
    tokens: int
    largest_logit_difference: float
    largest_logit: float
    mean_kl: float
    greedy_agreement: float
    dtype: str

    @property
    def holds(self) -> bool:
        """Whether the difference is no more than rounding explains: `TOLERANCE` of the largest logit for the dtype.

        Greedy choices may differ where two tokens nearly tie, and do so in bfloat16.
        """
        near = self.largest_logit_difference <= TOLERANCE[self.dtype] * self.largest_logit
        return near and self.greedy_agreement >= MIN_AGREEMENT

    def to_dict(self) -> dict[str, Any]:
        """As certificate.json holds it."""
        return asdict(self) | {"holds": self.holds}

    def __str__(self) -> str:
        return (
            f"{'equal' if self.holds else 'NOT equal'} up to rounding ({self.dtype}): largest logit difference "
            f"{self.largest_logit_difference:.3g} (largest logit {self.largest_logit:.3g}), KL {self.mean_kl:.2g} nats, "
            f"greedy agreement {100 * self.greedy_agreement:.1f}% of {self.tokens} tokens after {self.prompts} prompts"
        )


@torch.inference_mode()
def witness(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int = 24) -> Witness:
    """Let `model` answer `prompts` greedily, one by one, and keep the logits behind each token."""
    sequences, lengths, logits = [], [], []
    for prompt in prompts:
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids.to(model.device)
        sequence = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        sequences.append(sequence.cpu())
        lengths.append(ids.shape[1])
        logits.append(_answer_logits(model, sequence, ids.shape[1]))
    return Witness(sequences, lengths, logits)


@torch.inference_mode()
def certify(model: Any, expected: Witness) -> Certificate:
    """Compare `model` with the witness, token by token, on the witness's own sequences."""
    difference = largest = kl = 0.0
    same = tokens = 0
    for sequence, length, wanted in zip(expected.sequences, expected.prompt_lengths, expected.logits, strict=True):
        got = _answer_logits(model, sequence.to(model.device), length)
        difference = max(difference, (got - wanted).abs().max().item())
        largest = max(largest, wanted.abs().max().item())
        kl += torch.nn.functional.kl_div(got.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="sum").item()
        same += int((got.argmax(-1) == wanted.argmax(-1)).sum())
        tokens += len(wanted)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return Certificate(len(expected.sequences), tokens, difference, largest, kl / tokens, same / tokens, dtype)


def _answer_logits(model: Any, sequence: Tensor, prompt_length: int) -> Tensor:
    """Logits (answer length, vocabulary), float32, on the CPU."""
    return model(input_ids=sequence, use_cache=False).logits[0, prompt_length - 1 : -1].float().cpu()
