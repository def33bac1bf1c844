"""A conversation with a model, its answers piece by piece as they are made."""

import math
import queue
import threading
from collections.abc import Generator, Iterator
from contextlib import closing, nullcontext
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation import BaseStreamer

from bonetune.data import RowFormat, prompt_tokens
from bonetune.errors import InputError
from bonetune.evaluation.trained_with import QUESTION_FIELDS, question_template
from bonetune.models import Loaded, decode, load_model

Message = dict[str, str]


class Chat:
    """A conversation with a model or an adapter.

    A question is put by the tokenizer's chat template, with all that was said before. By a prompt template each question
    stands for itself: that of an adapter trained on instructions, and the papers' where there is no chat template. An adapter
    trained on prompts that are plain text gets the question as it is.

    Args:
        model: a model or adapter as `bonetune.models.load_model` takes it, or one already loaded.
        system: the conversation's first message, from the system; needs a chat template.
        prompt_template: with `{instruction}` in it, instead of all that.
        adapter: whether the adapter answers; False asks the base model beneath it.
        max_new_tokens: longest answer.
        temperature: 0 takes the most probable token each time; else tokens are drawn from softmax(logits / temperature).
        base: the adapter's base model, if it is not where the adapter says.
        dtype: of the model's weights.
        trust_remote_code: run code that comes with the model or the adapter.

    Attributes:
        messages: the conversation so far, {"role", "content"} each.

    Raises:
        InputError: a model that cannot be loaded, no adapter to leave away, a system message without a chat template, or a
            number out of its range.

    Example:
        >>> chat = bonetune.Chat("runs/first")
        >>> for piece in chat.ask("What is 12 plus 30?"):
        ...     print(piece, end="", flush=True)
    """

    def __init__(
        self,
        model: str | Loaded,
        *,
        system: str | None = None,
        prompt_template: str | None = None,
        adapter: bool = True,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        base: str | None = None,
        dtype: str = "auto",
        trust_remote_code: bool = False,
    ) -> None:
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens should be at least 1, got {max_new_tokens}.")
        if not math.isfinite(temperature) or temperature < 0:
            raise InputError(f"temperature should be 0 (the most probable token) or above, got {temperature}.")
        if prompt_template is not None:
            RowFormat("alpaca", QUESTION_FIELDS, prompt_template)
        self.loaded = load_model(model, dtype, base, trust_remote_code=trust_remote_code) if isinstance(model, str) else model
        if self.loaded.task_type != "CAUSAL_LM":
            name = self.loaded.adapter or self.loaded.base
            raise InputError(f"{name} is of the task {self.loaded.task_type}: only a model that writes on can be talked with.")
        if not adapter and not hasattr(self.loaded.model, "disable_adapter"):
            raise InputError(f"{self.loaded.base} is a model without an adapter: there is nothing to compare it with.")
        self.prompt_template = prompt_template or question_template(self.loaded)
        if system is not None and self.prompt_template is not None:
            raise InputError(
                "A system message needs the tokenizer's chat template, and questions are put by a prompt template."
            )
        self.system, self.adapter = system, adapter
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.messages: list[Message] = []
        self.reset()

    def reset(self) -> None:
        """Begin a new conversation; the system's message stays."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def ask(self, question: str) -> Generator[str]:
        """Put a question, and yield the answer in pieces.

        What has been yielded belongs to the conversation, also if the iterator is closed before its end or interrupted: the
        model stops then. After an error the conversation is as it was.

        Raises:
            InputError: an empty question, one that the chat template refuses, or a conversation too long for the model.
        """
        ids = self._prompt(question)
        room = getattr(self.loaded.model.config, "max_position_embeddings", None) or math.inf
        if len(ids) >= room:
            raise InputError(f"The conversation is of {len(ids)} tokens, and {self.loaded.base} takes {room}: begin a new one.")
        answer, failed = "", False
        try:
            with closing(self._pieces(ids, int(min(self.max_new_tokens, room - len(ids))))) as pieces:
                for piece in pieces:
                    answer += piece
                    yield piece
        except Exception:  # told from an answer that was only stopped, which was said as far as it went
            failed = True
            raise
        finally:
            if not failed:
                self.messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer.strip()}]

    def _prompt(self, question: str) -> list[int]:
        if not question.strip():
            raise InputError("An empty question.")
        if self.prompt_template is not None:
            row_format = RowFormat("alpaca", QUESTION_FIELDS, self.prompt_template)
            row = {"instruction": question, "output": ""}
        else:
            row_format = RowFormat("messages", ("messages",))
            row = {"messages": [*self.messages, {"role": "user", "content": question}, {"role": "assistant", "content": ""}]}
        prompt, _ = row_format.question_and_answer(row, self.loaded.tokenizer)
        return prompt_tokens(self.loaded.tokenizer, prompt, opened=self.prompt_template is None)

    def _pieces(self, ids: list[int], max_new_tokens: int) -> Generator[str]:
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        pieces, stop, errors = _Pieces(tokenizer), _Stop(), []

        def work() -> None:
            try:
                rows = torch.tensor([ids], device=model.device)
                with nullcontext() if self.adapter else model.disable_adapter():
                    decode(
                        model,
                        tokenizer,
                        rows,
                        torch.ones_like(rows),
                        max_new_tokens,
                        temperature=self.temperature,
                        streamer=pieces,
                        stopping_criteria=StoppingCriteriaList([stop]),
                    )
            except BaseException as error:
                errors.append(error)
                pieces.end()

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            yield from pieces
        finally:
            stop.asked.set()
            worker.join()
        if errors:
            raise errors[0]


class _Pieces(BaseStreamer):
    """Takes tokens from one thread and gives their text to another. The pieces are the decoded whole when joined."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.shown = 0
        self.queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.prompt_to_come = True

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_to_come:
            self.prompt_to_come = False
            return
        self.ids += value.flatten().tolist()
        # the end may be half of a character, which the next token completes
        self._show(self._text().rstrip("\N{REPLACEMENT CHARACTER}"))

    def end(self) -> None:
        self._show(self._text())
        self.queue.put(None)

    def __iter__(self) -> Iterator[str]:
        return iter(self.queue.get, None)

    def _text(self) -> str:
        return self.tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _show(self, text: str) -> None:
        if len(text) > self.shown:
            self.queue.put(text[self.shown :])
            self.shown = len(text)


class _Stop(StoppingCriteria):
    """Ends a generation at the next token once `asked` is set."""

    def __init__(self) -> None:
        self.asked = threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.asked.is_set(), dtype=torch.bool, device=input_ids.device)
