"""A causal language model's own forward, run on some supervised positions at a time."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import ModelOutput

from bonetune.data.examples import IGNORED
from bonetune.errors import InputError

CHUNK_BYTES = 32 << 20  # of the logits made at a time, in float32


def check_lengths(outputs: Tensor, tokens: torch.Size) -> None:
    """Raise `InputError` unless there is an output (batch, length, ...) for each token (batch, length)."""
    if outputs.shape[:2] != tokens:
        raise InputError(
            f"The model answers {tuple(tokens)} tokens with outputs of shape {tuple(outputs.shape)}: there is no loss for a "
            "model that makes its sequences longer or shorter."
        )


def negative_log_likelihood(logits: Tensor, targets: Tensor, penalty: float = 0.0) -> Tensor:
    """Of each target, 0 where it is `IGNORED`; logits (n, vocabulary), targets (n,).

    With a `penalty`, gradients are those of the sum of it and penalty / 2 * max(logits)^2 (RWKV's L2-wrap); the value is not.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = targets.to(wide.device)
    losses = functional.cross_entropy(wide, targets, ignore_index=IGNORED, reduction="none")
    if not penalty:
        return losses
    added = penalty / 2 * wide.amax(-1).square() * (targets != IGNORED)
    return losses + (added - added.detach())


def next_tokens(labels: Tensor) -> Tensor:
    """What each position is to predict: (batch, length) to the same, the label of the position after it."""
    return functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


class Scoring:
    """One call of a causal language model that gives the sum of its losses instead of its logits.

    The model's own forward is called once for each chunk of supervised positions. The first call runs its body; what the head
    finds as the last hidden state, in this and in the later calls, is the chunk's.

    Attributes:
        losses: (size,) each: what the chunks' positions lose.
        output: what the body returned.
        hidden: (n, features), the supervised positions' last hidden states; None if the body was not called where it was
            looked for.
    """

    def __init__(self, model: PreTrainedModel, targets: Tensor, size: int | None = None, penalty: float = 0.0) -> None:
        positions = (targets.flatten() != IGNORED).nonzero().squeeze(-1)
        self.some = len(positions) > 0
        # one that does not count, if there is none: then too every parameter has a gradient, as DDP needs
        self.positions = positions if self.some else positions.new_zeros(1)
        self.targets = targets.flatten()[self.positions].clamp(min=0)
        self.model, self.shape, self.size = model, targets.shape, size or _positions_at_once(model)
        self.forward = model.forward
        self.places = [(parent, name, _Body(parent._modules[name], self)) for parent, name in _places(model)]
        self.recompute = _head_is_sharded_apart(model)
        self.penalty = penalty
        self.losses: list[Tensor] = []
        self.hidden: Tensor | None = None
        self.output: Any = None
        self._chunk: Tensor | None = None
        self._inside = False

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """While it is open, the model's forward returns the sum as its `loss`."""
        before = self.model.__dict__.get("forward")
        self.model.forward = torch.compiler.disable(self._scored)
        try:
            yield
        finally:
            del self.model.forward
            if before is not None:
                self.model.forward = before

    def let_go(self) -> None:
        """Forget the graph: what hangs in a circle waits for the garbage collector, and its small pieces pin the heap."""
        if not self.recompute:
            self.hidden = self.output = self._chunk = None
            self.places = []

    def _scored(self, *args: Any, **kwargs: Any) -> CausalLMOutput:
        def logits_of(chunk: Tensor | None) -> Tensor:
            self._chunk = chunk
            with self._substituted():
                logits = self.forward(*args, **kwargs).logits
            return logits if self.hidden is None else logits[0]

        first = [logits_of(None)]  # a list, to be emptied: its caller must not keep what may be the largest tensor
        if self.hidden is None:
            check_lengths(first[0], self.shape)
            wanted = first[0].flatten(0, 1)[self.positions.to(first[0].device)]
            total = negative_log_likelihood(wanted, self.targets, self.penalty).sum() * self.some
        else:
            total = (self._recomputing if self.recompute else self._at_once)(first, logits_of)
        return CausalLMOutput(loss=total)  # pyright: ignore[reportArgumentType]  (any floating tensor will do)

    @contextlib.contextmanager
    def _substituted(self) -> Iterator[None]:
        try:
            for parent, name, body in self.places:
                parent._modules[name] = body
            yield
        finally:
            for parent, name, body in self.places:
                parent._modules[name] = body.real

    def run_body(self, body: nn.Module, args: Any, kwargs: Any) -> Any:
        """What the head's side gets when it calls the body: the chunk, inside whatever the body returned the first time."""
        if self._inside:  # a part of what runs already
            return body(*args, **kwargs)
        if self._chunk is None:
            self._inside = True
            try:
                self.output = body(*args, **kwargs)
            finally:
                self._inside = False
            hidden = self.output[0] if isinstance(self.output, (tuple, ModelOutput)) else self.output
            check_lengths(hidden, self.shape)
            self.hidden = hidden.flatten(0, 1)[self.positions.to(hidden.device)]
            self.targets = self.targets.to(hidden.device)
            self._chunk = self._part(0)
        chunk = self._chunk[None]
        if isinstance(self.output, ModelOutput):
            return type(self.output)(**{**self.output, next(iter(self.output)): chunk})
        return (chunk, *self.output[1:]) if isinstance(self.output, tuple) else chunk

    def _part(self, number: int) -> Tensor:
        assert self.hidden is not None
        part = self.hidden[number * self.size : (number + 1) * self.size]
        return part if self.recompute else part.detach().requires_grad_(part.requires_grad)

    def _at_once(self, first: list[Tensor], logits_of: Callable[[Tensor], Tensor]) -> Tensor:
        """Each chunk's loss and its gradients, so that the logits can go before the next chunk's come."""
        hidden_gradients, head, head_gradients = list[Tensor](), list[Tensor](), list[Tensor]()
        for number, targets in enumerate(self.targets.split(self.size)):
            chunk = self._part(number) if number else self._chunk
            assert chunk is not None
            head, gradients = self._score(chunk, logits_of(chunk) if number else first.pop(), targets)
            if chunk.requires_grad:
                hidden_gradients.append(gradients.pop(0))
            head_gradients = [a + b for a, b in zip(head_gradients, gradients, strict=True)] if number else gradients
        total = torch.cat(self.losses).sum() * self.some
        if not hidden_gradients and not head:
            return total
        hidden_gradient = torch.cat(hidden_gradients) if hidden_gradients else None
        return cast(Tensor, WithGradients.apply(total, (hidden_gradient, *head_gradients), self.hidden, *head))

    def _score(self, chunk: Tensor, logits: Tensor, targets: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Adds to the losses; what of the head is trained, and the gradients of the chunk (if it has one) and of that."""
        if not logits.requires_grad:
            self.losses.append(negative_log_likelihood(logits, targets))
            return [], []
        losses, gradient = _losses_and_gradient(logits.detach(), targets, self.penalty)
        self.losses.append(losses)
        head = [leaf for leaf in _leaves(logits) if leaf is not chunk]
        with torch.autocast(logits.device.type, enabled=False):
            wanted = [chunk, *head] if chunk.requires_grad else head
            return head, list(torch.autograd.grad(logits, wanted, gradient if self.some else 0 * gradient))

    def _recomputing(self, first: list[Tensor], logits_of: Callable[[Tensor], Tensor]) -> Tensor:
        """The sum, with each chunk's logits but the first's computed again in backward.

        For heads that are gathered for each use: what FSDP hangs on a forward must be followed by that forward's backward.
        """

        def loss_of(chunk: Tensor, targets: Tensor) -> Tensor:
            return negative_log_likelihood(logits_of(chunk), targets, self.penalty).sum()

        first_targets, *others = self.targets.split(self.size)
        total = negative_log_likelihood(first.pop(), first_targets, self.penalty).sum()
        for number, targets in enumerate(others, 1):
            total = total + cast(Tensor, checkpoint(loss_of, self._part(number), targets, use_reentrant=False))
        return total * self.some


class _Body(nn.Module):
    """Stands where a model's body hangs, and looks like it."""

    def __init__(self, real: nn.Module | None, scoring: Scoring) -> None:
        super().__init__()
        self.__dict__["real"], self.__dict__["scoring"] = real, scoring  # not a child: its parameters have their name already

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.scoring.run_body(self.real, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["real"], name)


def _places(model: PreTrainedModel) -> list[tuple[nn.Module, str]]:
    """Parent and name of what a forward may call as its body: some call the decoder inside the body itself."""
    named = [module for module in (model.base_model, model.get_decoder()) if _is_body(module, model)]
    # a model may name neither: its body is then what reads the tokens
    bodies = {id(module) for module in named or _readers(model)}
    places, parents = [], [model]
    for _ in range(3):
        places += [(parent, name) for parent in parents for name, child in parent._modules.items() if id(child) in bodies]
        parents = [child for parent in parents for child in parent.children() if not isinstance(child, nn.ModuleList)]
    return places


def _is_body(module: nn.Module, model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    return module is not model and (head is None or all(part is not head for part in module.modules()))


def _readers(model: PreTrainedModel) -> list[nn.Module]:
    embedding = model.get_input_embeddings()
    reading = [child for child in model.children() if any(part is embedding for part in child.modules())]
    return [child for child in reading if child is not embedding and _is_body(child, model)]


def _head_is_sharded_apart(model: PreTrainedModel) -> bool:
    """Whether FSDP2 or ZeRO-3 gathers the head by itself (and not with the whole model, which is open around its forward)."""
    bodies = [parent._modules[name] for parent, name in _places(model)]
    outside = nn.ModuleList(child for child in model.children() if not any(child is body for body in bodies))
    by_zero = any(hasattr(parameter, "ds_id") for parameter in outside.parameters())
    return by_zero or any(isinstance(module, FSDPModule) for module in outside.modules())


def _positions_at_once(model: PreTrainedModel) -> int:
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None) or 1 << 16
    return max(16, CHUNK_BYTES // (4 * vocabulary))


def _losses_and_gradient(logits: Tensor, targets: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """-log softmax at the targets, and softmax - onehot in the logits' dtype, with one exponential of each logit.

    With a `penalty`, the gradient has its term too: see `negative_log_likelihood`.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    probabilities = wide.softmax(-1)
    largest, places = wide.max(-1)
    # log sum exp, from the largest logit, whose probability is at least 1 / vocabulary
    normalizer = largest - probabilities.amax(-1).log()
    rows = torch.arange(len(targets), device=targets.device)
    losses = normalizer - wide[rows, targets]
    probabilities[rows, targets] -= 1
    if penalty:
        probabilities[rows, places] += penalty * largest
    return losses, probabilities.to(logits.dtype)


def _leaves(tensor: Tensor) -> list[Tensor]:
    """The leaves that a tensor's gradient flows to."""
    found, seen, nodes = [], set(), [tensor.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if hasattr(node, "variable"):
                found.append(node.variable)  # pyright: ignore[reportAttributeAccessIssue]  (an AccumulateGrad has one)
            nodes += [following for following, _ in node.next_functions]
    return found


class WithGradients(torch.autograd.Function):
    """A sum whose gradients are known: of the hidden states, and of the head's trainable tensors."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, gradients: tuple[Tensor | None, ...], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if g is None else (scale * g.to(scale.dtype)).to(g.dtype) for g in ctx.saved_tensors)
        return None, None, *scaled
