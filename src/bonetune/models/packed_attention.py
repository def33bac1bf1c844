"""Sequences laid end to end in one row that do not see each other, without a mask of row by row."""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from bonetune.errors import InputError

PACKED_SDPA = "packed_sdpa"  # with sdpa in its name, so that transformers asks whether the model can have it

_PROBE_LENGTHS = (5, 3, 6)
# What a layer that remembers is called, and what a configuration calls its kind.
_RECURRENT = ("Mamba", "Recurrent", "Rglru", "ShortConv", "DeltaNet", "Rwkv", "LinearAttention", "LightningAttention")
_RECURRENT_KINDS = ("linear", "conv", "hybrid", "mamba", "recurrent")
# Types of rotary embeddings whose frequencies depend on the longest sequence of a row.
_ROPE_OF_THE_ROW = ("dynamic", "longrope")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@contextlib.contextmanager
def packed_attention(model: Any, implementation: str = "auto") -> Iterator[str]:
    """Set how a model attends, for training on packed rows, and set it back at the end. Gives the implementation's name.

    To be open around forward and backward: gradient checkpointing attends again in backward.

    Args:
        model: a Hugging Face model, adapted or not.
        implementation: auto is `packed_sdpa` for a model that has sdpa, and whatever it has otherwise. `packed_sdpa` attends
            sequence by sequence where a row holds several, and is transformers' sdpa everywhere else. Or any of transformers'.

    Raises:
        InputError: the model cannot have it.
    """
    inner = _language_model(model)
    before = [(part.config, part.config._attn_implementation) for part in inner.modules() if isinstance(part, PreTrainedModel)]
    present = str(inner.config._attn_implementation)
    wanted = implementation
    if implementation == "auto":
        wanted = PACKED_SDPA if present == "sdpa" and inner._can_set_attn_implementation() else present
    try:
        if wanted != present:
            try:
                inner.set_attn_implementation(wanted)
            except (ValueError, ImportError) as error:
                raise InputError(f"{type(inner).__name__} cannot attend by {wanted!r}: {error}") from error
            if inner.config._attn_implementation != wanted:
                raise InputError(
                    f"{type(inner).__name__} has no choice of attention: leave attn_implementation at auto and packing off."
                )
        yield wanted
    finally:
        for config, name in before:
            config._attn_implementation_internal = name


@torch.no_grad()
def packing_obstacle(model: Any) -> str | None:
    """Why a model cannot be trained on packed rows, in a sentence, or None if it can. Found by trying, on a few tokens.

    Three short sequences must get the logits that each gets alone, and what one of them holds must not reach the others: their
    logits stay the same, bit by bit. Layers that remember what they have read, and positions that depend on the whole row, are
    known by their names. The attention is the one that is set: see `packed_attention`. The model is left as it was.
    """
    inner = _language_model(model)
    name = type(inner).__name__
    if inner.config.is_encoder_decoder:
        return f"{name} is an encoder-decoder."
    if "position_ids" not in inspect.signature(inner.forward).parameters:
        return f"{name} takes no position_ids, so that it cannot know where a sequence begins."
    # a model may say itself that what its layers remember ends where cu_seq_lens_q says
    known = None if getattr(inner, "packs_by_boundaries", False) else _known_obstacle(inner, name)
    if known is not None:
        return known
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        return _tried(model, inner, name)
    except Exception as error:  # whatever a model's code makes of an input that it does not expect
        return f"{name} fails on a packed row: {type(error).__name__}: {error}"
    finally:
        for module, training in modes.items():
            module.training = training


def _known_obstacle(inner: PreTrainedModel, name: str) -> str | None:
    """What few tokens and small weights may not show."""
    config = inner.config.get_text_config(decoder=True)
    kinds = {rope.get("rope_type") or rope.get("type") for rope in _ropes(config)}
    for kind in _ROPE_OF_THE_ROW:
        if kind in kinds:
            return f"{name} has {kind} positions, which depend on how long the longest sequence of a row is."
    layers = set(getattr(config, "layer_types", None) or ())
    remembering = {kind for kind in layers if any(word in kind for word in _RECURRENT_KINDS)}
    remembering = remembering or {type(module).__name__ for module in _decoder(inner).modules() if _remembers(module)}
    if remembering:
        return f"{name} has layers that go on from one sequence of a row to the next: {', '.join(sorted(remembering))}."
    return None


def _remembers(module: nn.Module) -> bool:
    along_the_row = isinstance(module, nn.Conv1d) and module.kernel_size != (1,)
    return along_the_row or any(word in type(module).__name__ for word in _RECURRENT)


def _ropes(config: Any) -> list[dict[str, Any]]:
    """The settings of the rotary embeddings, one for all layers or one for each kind of layer."""
    found = [getattr(config, name, None) for name in ("rope_parameters", "rope_scaling")]
    ropes = [rope for rope in found if isinstance(rope, dict)]
    return ropes + [of_kind for rope in ropes for of_kind in rope.values() if isinstance(of_kind, dict)]


def _decoder(inner: PreTrainedModel) -> nn.Module:
    """What holds the decoder's layers: some models call their head the decoder."""
    decoder = inner.get_decoder()
    return decoder if any(isinstance(module, nn.ModuleList) for module in decoder.modules()) else inner


def _tried(model: Any, inner: PreTrainedModel, name: str) -> str | None:
    vocabulary = cast(Tensor, inner.get_input_embeddings().weight).shape[0]
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(vocabulary, (length,), generator=generator).to(inner.device) for length in _PROBE_LENGTHS]
    apart = [model(input_ids=ids[None], use_cache=False).logits for ids in sequences]
    if any(logits.shape[:2] != (1, length) for logits, length in zip(apart, _PROBE_LENGTHS, strict=True)):
        return f"{name} is no language model: it has no output for each token."
    together = _packed_logits(model, sequences)
    if not all(_close(mine, alone) for mine, alone in zip(together, apart, strict=True)):
        return f"{name} gives packed sequences other logits than each of them alone."
    for changed in range(len(sequences)):
        others = [ids if i != changed else ids.roll(1).add(1).remainder(vocabulary) for i, ids in enumerate(sequences)]
        for i, (new, old) in enumerate(zip(_packed_logits(model, others), together, strict=True)):
            if i != changed and not _unreached(new, old, inner):
                return f"{name} lets packed sequences see each other."
    return None


def _packed_logits(model: Any, sequences: list[Tensor]) -> tuple[Tensor, ...]:
    lengths = [len(ids) for ids in sequences]
    device = sequences[0].device
    ends = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    logits = model(
        input_ids=torch.cat(sequences)[None],
        position_ids=torch.cat([torch.arange(length, device=device) for length in lengths])[None],
        cu_seq_lens_q=ends,
        cu_seq_lens_k=ends,
        max_length_q=max(lengths),
        max_length_k=max(lengths),
        use_cache=False,
    ).logits
    return logits.split(lengths, 1)


def _close(a: Tensor, b: Tensor) -> bool:
    allowed = 1e-3 if b.dtype in (torch.float32, torch.float64) else 0.05
    return bool((a - b).float().norm() <= allowed * b.float().norm())


def _unreached(new: Tensor, old: Tensor, inner: PreTrainedModel) -> bool:
    """Whether the logits are the same, token by token: bit by bit, unless rounding depends on what else is in the row."""
    if torch.equal(new, old):
        return True
    if getattr(inner, "is_quantized", False):  # activations may be quantized with the outliers of the whole row
        allowed = 0.05
    elif _has_experts(inner):  # an expert's products change their shape, and so their rounding, with its tokens
        allowed = 1e-5 if old.dtype in (torch.float32, torch.float64) else 0.02
    else:
        return False
    return bool(((new - old).float().norm(dim=-1) <= allowed * old.float().norm(dim=-1)).all())


def _has_experts(inner: PreTrainedModel) -> bool:
    config = inner.config.get_text_config(decoder=True)
    return any((getattr(config, name, None) or 0) > 1 for name in _EXPERTS) or any(
        type(module).__name__.endswith(("Router", "Experts", "SparseMoeBlock")) for module in inner.modules()
    )


def _language_model(model: Any) -> PreTrainedModel:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(inner, PreTrainedModel):
        raise InputError(f"A {type(inner).__name__} cannot be packed: it is no model of transformers.")
    return inner


# What is registered with transformers: a mask, which its models hand on to their layers unread, and what attends by it.


def packed_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    mask_function: Any,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **others: Any,
) -> Tensor | None:
    """Of a row of several sequences: for each token, the first that it sees and the first of its sequence; else sdpa's mask.

    Args:
        batch_size, q_length, kv_length, mask_function, attention_mask, allow_is_causal_skip, use_vmap, device, others: as
            transformers calls its mask functions.

    Returns:
        (1, 1, row, 2), int64, which stands for a mask of (row, row); or what `sdpa_mask` returns.
    """
    if batch_size == 1 and attention_mask is None and q_length == kv_length and not (allow_is_causal_skip or use_vmap):
        spans = _spans(mask_function, q_length, device)
        if spans is not None:
            return spans
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        use_vmap=use_vmap,
        device=device,
        **others,
    )


@torch.compiler.disable()
def _spans(mask_function: Any, length: int, device: torch.device | str) -> Tensor | None:
    """None if the row is one sequence, or tokens see what comes after them."""
    zero = torch.zeros((), dtype=torch.int64, device=device)
    tokens = torch.arange(length, device=device)

    def sees(others: Tensor) -> Tensor:
        return mask_function(zero, zero, tokens, others).expand(length)

    cut = ~sees((tokens - 1).clamp(min=0))
    cut[0] = False
    ahead = sees((tokens + 1).clamp(max=length - 1))[:-1]
    if not cut.any() or ahead.any() or not sees(tokens).all():
        return None
    begins = torch.where(cut, tokens, 0).cummax(0).values
    # what a token sees, be it all before it, a window or a chunk, is without gaps and ends with itself
    first, last = begins, tokens
    for _ in range(length.bit_length()):
        middle = (first + last) // 2
        seen = sees(middle)
        first, last = torch.where(seen, first, middle + 1), torch.where(seen, middle, last)
        first = torch.minimum(first, last)
    return torch.stack([first, begins], -1)[None, None]


def packed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention sequence by sequence where the mask is `packed_mask`'s or cu_seq_lens_q tells of several; else sdpa's.

    Args:
        module, attention_mask, dropout, scaling, is_causal, others: as transformers calls its attention functions.
        query: (batch, heads, row, features); key and value may have fewer heads, which divide its.

    Returns:
        (batch, row, heads, features), and no weights.

    Raises:
        InputError: capped scores, sinks, and in packed rows position biases and attention that looks ahead.
    """
    for unknown in ("softcap", "s_aux", *(["position_bias"] if _is_packed(attention_mask, others) else [])):
        if others.get(unknown) is not None:
            raise InputError(f"{type(module).__name__} asks for {unknown}, which {PACKED_SDPA} has not: attend by eager.")
    if not _is_packed(attention_mask, others):
        arguments = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **arguments, **others)
    if attention_mask is None:
        if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
            raise InputError(f"{type(module).__name__} looks ahead: its sequences cannot be packed.")
        attention_mask = _spans_of_lengths(others["cu_seq_lens_q"], others.get("sliding_window"))
    if query.shape[2] != attention_mask.shape[2] or key.shape[2] != attention_mask.shape[2]:
        raise InputError(f"A packed row of {attention_mask.shape[2]} tokens meets {key.shape[2]} keys: pass use_cache=False.")
    return _by_sequence(query, key, value, attention_mask, dropout, scaling), None


def _is_packed(attention_mask: Tensor | None, others: dict[str, Any]) -> bool:
    if attention_mask is None:
        return others.get("cu_seq_lens_q") is not None and len(others["cu_seq_lens_q"]) > 2
    return attention_mask.dtype == torch.int64


def _spans_of_lengths(ends: Tensor, window: int | None) -> Tensor:
    """As `packed_mask`, for models whose masks know nothing of positions."""
    known = getattr(ends, "_spans", {})
    if window not in known:
        tokens = torch.arange(int(ends[-1]), device=ends.device)
        begins = ends[:-1].long().repeat_interleave(ends.diff())
        first = begins if window is None else torch.maximum(begins, tokens - window + 1)
        known[window] = torch.stack([first, begins], -1)[None, None]
        ends._spans = known  # pyright: ignore[reportAttributeAccessIssue]  (the layers of a forward share the tensor)
    return known[window]


@torch.compiler.disable()
def _by_sequence(query: Tensor, key: Tensor, value: Tensor, spans: Tensor, dropout: float, scaling: float | None) -> Tensor:
    lengths, masks = _blocks(spans)
    outputs = [
        scaled_dot_product_attention(
            q, k, v, mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        ).transpose(1, 2)
        # split's backward is one concatenation; each slice's would be a row of zeros
        for q, k, v, mask in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), masks, strict=True)
    ]
    return torch.cat(outputs, 1)


def _blocks(spans: Tensor) -> tuple[list[int], list[Tensor | None]]:
    """Lengths of the sequences, and the mask of each that is not simply causal; once for all layers of a forward."""
    known = getattr(spans, "_blocks", None)
    if known is None:
        first, begins = spans[0, 0].unbind(-1)
        counts = begins.unique_consecutive(return_counts=True)[1].tolist()
        masks: list[Tensor | None] = []
        for offsets in (first - begins).split(counts):
            tokens = torch.arange(len(offsets), device=spans.device)
            windowed = (tokens <= tokens[:, None]) & (tokens >= offsets[:, None])
            masks.append(windowed if offsets.any() else None)
        known = spans._blocks = (counts, masks)  # pyright: ignore[reportAttributeAccessIssue]  (as above)
    return known


AttentionInterface.register(PACKED_SDPA, packed_sdpa)
AttentionMaskInterface.register(PACKED_SDPA, packed_mask)
