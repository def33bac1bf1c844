"""The loss of long sequences, a segment at a time: truncated backpropagation through time, for models that carry a state."""

from typing import Any

import torch
from torch import Tensor, nn

from bonetune.data.examples import IGNORED
from bonetune.errors import InputError
from bonetune.losses.chunks import Scoring, WithGradients, next_tokens
from bonetune.losses.completion import scores_by_chunks, unwrapped


def segmented_loss(
    model: Any,
    *,
    labels: Tensor,
    bptt_length: int,
    supervised: Tensor | int | None = None,
    penalty: float = 0.0,
    **inputs: Tensor,
) -> Tensor:
    """`completion_loss` of sequences that are gone through in segments, each on the state that the one before it left.

    The value is that of the whole sequences. Gradients flow back to the beginning of their segment: the states between
    segments are constants. What is kept for backward is one segment's at a time, so that memory does not grow with the length.

    Args:
        model: a model whose forward takes and returns a `state` (`bonetune.rwkv`), adapted or not, bare or inside DDP.
        labels: (batch, length), int64; `IGNORED` where not supervised.
        bptt_length: tokens of a segment.
        supervised, penalty: as `completion_loss`.
        inputs: (batch, length) each: input_ids and attention_mask.

    Raises:
        InputError: the model carries no state.
    """
    language_model = unwrapped(model)
    if language_model is None or not getattr(language_model, "carries_state", False):
        raise InputError(f"{type(model).__name__} carries no state from one segment to the next: leave bptt_length out.")
    if not scores_by_chunks(language_model):
        raise InputError(f"{type(language_model).__name__} has other logits by chunks than at once: leave bptt_length out.")
    if supervised is None:
        supervised = (labels[:, 1:] != IGNORED).sum().clamp(min=1)
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients: list[Tensor | None] = [None] * len(trained)
    targets, state, losses = next_tokens(labels), None, []
    for begin in range(0, labels.shape[1], bptt_length):
        columns = slice(begin, begin + bptt_length)
        segment = {name: value[:, columns] for name, value in inputs.items()}
        scoring = Scoring(language_model, targets[:, columns], penalty=penalty)
        # DDP prepares for one backward with each of its forwards, and there will be one
        forward = model if columns.stop >= labels.shape[1] else inner
        with scoring.installed():
            loss = forward(use_cache=True, state=state, **segment).loss
        state = scoring.output[1].detached()
        scoring.let_go()
        losses.append(loss.detach())
        if loss.requires_grad:
            found = torch.autograd.grad(loss, trained, allow_unused=True)
            gradients = [_sum(have, more) for have, more in zip(gradients, found, strict=True)]
    total = torch.stack(losses).sum()
    if any(gradient is not None for gradient in gradients):
        total = WithGradients.apply(total, tuple(gradients), *trained)
    return total / supervised  # pyright: ignore[reportOperatorIssue]  (a tensor)


def _sum(have: Tensor | None, more: Tensor | None) -> Tensor | None:
    return more if have is None else have if more is None else have + more
