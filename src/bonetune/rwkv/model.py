"""RWKV-6 and RWKV-7 as Hugging Face models, for `generate`, Trainer and PEFT, whose state_dict is RWKV's own file."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from bonetune.errors import InputError
from bonetune.rwkv.configuration import RwkvConfig
from bonetune.rwkv.initialization import initialize
from bonetune.rwkv.layers import LayerNorm, LayerState
from bonetune.rwkv.sequences import Sequences, boundaries_of
from bonetune.rwkv.x060 import ChannelMixing6, TimeMixing6
from bonetune.rwkv.x070 import ChannelMixing7, TimeMixing7


class RwkvState(list[LayerState]):
    """What a model carries from one token to the next, of constant size: a `LayerState` for each block."""

    def detached(self) -> "RwkvState":
        """The same values, through which no gradient flows back."""
        return self._each(lambda tensor: tensor.detach())

    def of_sequences(self, numbers: Tensor) -> "RwkvState":
        """Those of the sequences of these numbers, (any,), int64."""
        return self._each(lambda tensor: tensor.index_select(0, numbers.to(tensor.device)))

    def _each(self, change: Any) -> "RwkvState":
        return RwkvState(LayerState(change(layer.att), change(layer.wkv), change(layer.ffn)) for layer in self)


@dataclass
class RwkvOutput(ModelOutput):
    """What a forward gives.

    Args:
        loss: with labels, the mean cross-entropy of the next tokens.
        logits: (batch, length, vocabulary).
        state: after each sequence of the batch, where it was asked for (`use_cache`).
        hidden_states: before the first block and after each, with `output_hidden_states`: (batch, length, hidden) each.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: RwkvState | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class RwkvBlock(GradientCheckpointingLayer):
    """A block: time mixing and channel mixing, each on a norm of what it adds to. The first one normalizes the embeddings."""

    def __init__(self, config: RwkvConfig, number: int) -> None:
        super().__init__()
        width = config.hidden_size
        if number == 0:
            self.ln0 = LayerNorm(width)
        self.ln1, self.ln2 = LayerNorm(width), LayerNorm(width)
        if config.version == "x060":
            self.att, self.ffn = TimeMixing6(config), ChannelMixing6(config)
        else:
            self.att, self.ffn = TimeMixing7(config, number == 0), ChannelMixing7(config)

    def forward(
        self, x: Tensor, first: Tensor | None, sequences: Sequences, state: LayerState | None, wanted: bool
    ) -> tuple[Tensor, Tensor | None, LayerState | None]:
        """(tokens, hidden) to the same.

        Args:
            x: the row.
            first: the first block's values, in later blocks of x070.
            sequences: where they begin.
            state: before them; None: they begin here.
            wanted: whether the state after them is.

        Returns:
            the row, the first block's values, and the state.
        """
        if hasattr(self, "ln0"):
            x = self.ln0(x)
        seen = self.ln1(x)
        y, first, carried = self.att(seen, first, sequences, state)
        x = x + y.to(x.dtype)
        seen_after = self.ln2(x)
        x = x + self.ffn(seen_after, sequences, state).to(x.dtype)
        if not wanted:
            return x, first, None
        att, ffn = (None, None) if state is None else (state.att, state.ffn)
        return x, first, LayerState(sequences.last(seen, att), carried, sequences.last(seen_after, ffn))


class RwkvForCausalLM(PreTrainedModel, GenerationMixin):
    """An RWKV-6 or RWKV-7 language model.

    Its parameters are called as in RWKV's files: `emb`, `blocks.0.att.receptance`, `ln_out`, `head`. Padding, on either side,
    is left out of the computation; `cu_seq_lens_q` says where the sequences of a packed row begin. Either way each sequence
    gets what it gets alone.

    Args:
        config: the sizes.
    """

    config_class = RwkvConfig
    config: RwkvConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RwkvBlock"]  # noqa: RUF012  (as transformers has it)
    _is_stateful = True
    # A parameter may have another dtype than the others: it is cast where it is used.
    takes_float32_parameters = True
    # Sequences of a packed row begin where cu_seq_lens_q says, whatever a layer remembers.
    packs_by_boundaries = True
    # A forward goes on from a `state` and returns one.
    carries_state = True

    def __init__(self, config: RwkvConfig) -> None:
        super().__init__(config)
        self.emb = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(RwkvBlock(config, number) for number in range(config.num_hidden_layers))
        self.ln_out = LayerNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.trunk = _Trunk(self)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        initialize(module, self.config)

    @property
    def dtype(self) -> torch.dtype:
        """Of what flows from block to block: the projections' dtype; over quantized ones, the configuration's."""
        first: Any = self.blocks[0]
        return _dtype_of(first.att.receptance, cast(Any, self.config.dtype) or torch.float32)

    def get_input_embeddings(self) -> nn.Module:
        return self.emb

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.emb = value

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.head = new_embeddings

    def get_decoder(self) -> nn.Module:
        return self.trunk

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        state: RwkvState | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> RwkvOutput | tuple[Any, ...]:
        """The logits of each token's next one.

        Args:
            input_ids: (batch, length), int64.
            attention_mask: (batch, length), 0 where there is padding, on either side.
            state: of an earlier forward, after whose tokens these come; None: they begin here.
            inputs_embeds: (batch, length, hidden), instead of input_ids.
            labels: (batch, length), -100 where there is nothing to learn.
            use_cache: whether to return the state; None: outside training.
            logits_to_keep: of how many of the last tokens, or of which columns, logits are wanted; 0: of all.
            output_hidden_states: whether to return what is between the blocks.
            cu_seq_lens_q: (sequences + 1,), of a packed row.
            position_ids: (1, length), of a packed row without cu_seq_lens_q: a sequence begins at each 0. Else not read.
            return_dict: false: a tuple of what there is.
            kwargs: what transformers hands on beside these.

        Raises:
            InputError: neither or both of input_ids and inputs_embeds, masks or states of another batch.
        """
        wanted = (not self.training) if use_cache is None else use_cache
        if cu_seq_lens_q is None and attention_mask is None and position_ids is not None:
            cu_seq_lens_q = boundaries_of(position_ids)
        hidden, after, between = self.trunk(
            input_ids,
            inputs_embeds,
            attention_mask=attention_mask,
            state=state,
            use_cache=wanted,
            cu_seq_lens_q=cu_seq_lens_q,
            output_hidden_states=bool(output_hidden_states),
        )
        columns = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        kept = hidden[:, columns] if isinstance(columns, Tensor) or logits_to_keep else hidden
        logits = self.head(kept.to(_dtype_of(self.head, kept.dtype)))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = RwkvOutput(cast(Any, loss), logits, after, between)
        return output.to_tuple() if return_dict is False else output

    def prepare_inputs_for_generation(self, input_ids: Tensor, state: RwkvState | None = None, **kwargs: Any) -> dict[str, Any]:
        """With a state, the tokens that it has not seen; without one, all."""
        transformers: Any = super()
        inputs = transformers.prepare_inputs_for_generation(input_ids, state=state, **kwargs)
        if not kwargs.get("is_first_iteration"):
            if kwargs.get("use_cache", True):
                inputs["attention_mask"] = None
        elif state is not None:
            inputs["state"] = state
        return inputs

    def _expand_inputs_for_generation(self, expand_size: int = 1, state: RwkvState | None = None, **kwargs: Any) -> Any:
        """Several continuations of each sequence, each with its state."""
        transformers: Any = super()
        ids, others = transformers._expand_inputs_for_generation(expand_size=expand_size, **kwargs)
        if state is not None:
            others["state"] = state.of_sequences(torch.arange(len(state[0].att)).repeat_interleave(expand_size))
        return ids, others

    def _reorder_cache(self, state: RwkvState, beam_idx: Tensor) -> RwkvState:
        return state.of_sequences(beam_idx)


class _Trunk(nn.Module):
    """Everything before the head, as a module without parameters of its own: so the loss can run the head by chunks."""

    def __init__(self, model: RwkvForCausalLM) -> None:
        super().__init__()
        self.__dict__["model"] = model  # not a child: the file's names have no trunk

    def forward(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        state: RwkvState | None,
        use_cache: bool,
        cu_seq_lens_q: Tensor | None,
        output_hidden_states: bool,
    ) -> tuple[Tensor, RwkvState | None, tuple[Tensor, ...] | None]:
        """Hidden states (batch, length, hidden), the state after each sequence, and what is between the blocks."""
        model = self.__dict__["model"]
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("Pass either input_ids or inputs_embeds.")
        batch = input_ids if inputs_embeds is None else inputs_embeds
        assert batch is not None
        shape = batch.shape[:2]
        sequences = Sequences.of(shape, batch.device, attention_mask, cu_seq_lens_q)
        if state is not None and (len(state), len(state[0].att)) != (len(model.blocks), len(sequences.lengths)):
            raise InputError(
                f"The state is of {len(state)} blocks and {len(state[0].att)} sequences, and the model and the batch have "
                f"{len(model.blocks)} and {len(sequences.lengths)}."
            )
        row = sequences.flat(batch)
        x = (model.emb(row) if inputs_embeds is None else row).to(model.dtype)
        first, carried, between = None, RwkvState(), [x]
        for number, block in enumerate(model.blocks):
            x, first, after = block(x, first, sequences, None if state is None else state[number], use_cache)
            between.append(x)
            if after is not None:
                carried.append(after)
        hidden = sequences.unflat(model.ln_out(x), shape)
        seen = tuple(sequences.unflat(each, shape) for each in between) if output_hidden_states else None
        return hidden, carried if use_cache else None, seen


def _dtype_of(layer: nn.Module, otherwise: torch.dtype) -> torch.dtype:
    weight = layer.weight
    return weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else otherwise
