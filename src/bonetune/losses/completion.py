"""The training loss of a language model, with logits computed only where a label needs them."""

import inspect
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bonetune.data.examples import IGNORED
from bonetune.losses.chunks import Scoring, check_lengths, negative_log_likelihood, next_tokens

# Models whose logits are not a function of the last hidden state alone, as `check_loss` found out.
_WHOLE: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def completion_loss(
    model: Any, *, labels: Tensor, supervised: Tensor | int | None = None, penalty: float = 0.0, **inputs: Any
) -> Tensor:
    """sum over supervised tokens of -log p(token | what precedes it), divided by `supervised`.

    Args:
        model: a Hugging Face language model: adapted or not, bare or inside DDP, FSDP2 or torch.compile.
        labels: (batch, length), int64; `IGNORED` where not supervised. In rows of several sequences laid end to end, so is
            each sequence's first. Of an encoder-decoder: what its decoder is to say.
        supervised: what to divide by, the number of supervised tokens of all batches that make one optimizer step; None
            divides by this batch's own (by 1, if it has none).
        penalty: of each supervised position's largest logit, in the gradients alone: `bonetune.losses.chunks`.
        inputs: what the model's forward takes: input_ids and attention_mask (batch, length), or input_ids and position_ids
            (1, length) with cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k.

    The model's body runs once, its head on some supervised positions at a time; each chunk's gradient is computed beside its
    loss, so that nothing of the vocabulary's size is kept. The model's own code makes the logits, in its own dtype; the
    cross-entropy is float32. A model that cannot be run so (encoder-decoders; see `check_loss`) makes all logits at once.
    A mixture's auxiliary loss is not added.

    Raises:
        InputError: the model's outputs do not line up with the labels.
    """
    language_model = unwrapped(model)
    encoder_decoder = language_model is not None and language_model.config.is_encoder_decoder
    if language_model is None or encoder_decoder or not scores_by_chunks(language_model):
        total = _from_all_logits(model, language_model, labels, inputs, penalty).sum()
    else:
        scoring = Scoring(language_model, next_tokens(labels), penalty=penalty)
        with scoring.installed():
            total = model(use_cache=False, **inputs).loss
        scoring.let_go()
    if supervised is None:
        supervised = ((labels if encoder_decoder else labels[:, 1:]) != IGNORED).sum().clamp(min=1)
    return total / supervised


@torch.no_grad()
def example_losses(model: Any, *, labels: Tensor, **inputs: Any) -> Tensor:
    """The loss of each sequence, summed over its supervised tokens: (batch,), float32 (float64 of a model in it).

    Arguments and errors are those of `completion_loss`, for sequences that are padded, not packed.
    """
    language_model = unwrapped(model)
    encoder_decoder = language_model is not None and language_model.config.is_encoder_decoder
    if not ((labels if encoder_decoder else labels[:, 1:]) != IGNORED).any():
        return torch.zeros(len(labels), device=labels.device)
    if language_model is not None and not encoder_decoder and scores_by_chunks(language_model):
        scoring = Scoring(language_model, next_tokens(labels))
        with scoring.installed():
            model(use_cache=False, **inputs)
        if scoring.losses:
            losses = torch.cat(scoring.losses)
            rows = (scoring.positions // labels.shape[1]).to(losses.device)
            return losses.new_zeros(len(labels)).index_add(0, rows, losses)
    return _from_all_logits(model, language_model, labels, inputs, 0.0).sum(1)


def scores_by_chunks(language_model: nn.Module) -> bool:
    """Whether `check_loss` has not found that the model's logits cannot be made by chunks."""
    return language_model not in _WHOLE


@torch.no_grad()
def check_loss(model: Any, vocabulary: int) -> bool:
    """Whether the logits that `completion_loss` makes by chunks are the model's own, on a few random tokens.

    To be called once, before training and before the model is distributed. Where it is not so, `completion_loss` makes all
    logits of this model at once from then on; so too where the chunks fail and the model alone does not.

    Args:
        model: as `completion_loss` takes it.
        vocabulary: token ids are drawn below it.
    """
    language_model = unwrapped(model)
    if language_model is None or language_model.config.is_encoder_decoder:
        return False
    generator = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(vocabulary, (2, 8), generator=generator).to(language_model.device) for _ in range(2))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        whole = negative_log_likelihood(model(**inputs).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        chunked = _trial(model, language_model, labels, inputs)
    finally:
        for module, training in modes.items():
            module.training = training
    # products of other shapes round differently
    close = 1e-3 if language_model.dtype in (torch.float32, torch.float64) else 0.1
    agree = chunked is not None and torch.allclose(chunked, whole, rtol=close, atol=close)
    (_WHOLE.discard if agree else _WHOLE.add)(language_model)
    return agree


def _trial(model: Any, language_model: PreTrainedModel, labels: Tensor, inputs: dict[str, Any]) -> Tensor | None:
    """The losses by chunks; None if the model's code cannot be run so."""
    try:
        scoring = Scoring(language_model, next_tokens(labels), size=3)
        with scoring.installed():
            model(**inputs)
    except Exception:  # whatever a model's code makes of a body that it does not expect
        return None
    return None if scoring.hidden is None else torch.cat(scoring.losses)


def unwrapped(model: Any) -> PreTrainedModel | None:
    """The Hugging Face model inside adapters, DDP and torch.compile, if there is nothing else around it."""
    while not isinstance(model, PreTrainedModel):
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel) or type(model).__name__ == "DeepSpeedEngine":
            model = model.module
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return None
    return model


def _from_all_logits(model: Any, language_model: Any, labels: Tensor, inputs: dict[str, Any], penalty: float) -> Tensor:
    """(batch, columns), the losses of the targets, from logits of all positions, or of the columns with a label if possible."""
    if language_model is not None and language_model.config.is_encoder_decoder:
        decoder_input_ids = language_model.prepare_decoder_input_ids_from_labels(labels=labels)
        logits, targets = model(use_cache=False, decoder_input_ids=decoder_input_ids, **inputs).logits, labels
    else:
        targets = labels[:, 1:]
        columns = (targets != IGNORED).any(0).nonzero().squeeze(-1)
        targets = targets[:, columns]
        if language_model is not None and "logits_to_keep" in inspect.signature(language_model.forward).parameters:
            logits = model(use_cache=False, logits_to_keep=columns, **inputs).logits
        else:
            logits = model(use_cache=False, **inputs).logits
            check_lengths(logits, labels.shape)
            logits = logits[:, columns]
    check_lengths(logits, targets.shape)
    return negative_log_likelihood(logits.flatten(0, 1), targets.flatten(), penalty).view(targets.shape)
