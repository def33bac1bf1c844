"""Conversations, rendered by the tokenizer's chat template and cut into what the assistant says and the rest."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from bonetune.errors import InputError

Message = dict[str, Any]
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


@dataclass(frozen=True)
class Segment:
    """A piece of an example's text, and whether the model is trained to write it."""

    text: str
    supervised: bool


def conversation_segments(messages: Sequence[Message], tokenizer: Any, answers_from: int = 0) -> list[Segment]:
    """The rendered conversation in pieces, supervised between the template's prompt for the assistant and the end of its turn.

    Args:
        messages: {role, content} each, as `check_messages` wants them.
        tokenizer: with a chat template.
        answers_from: number of the first message that may be supervised.

    Raises:
        InputError: no chat template, or one that refuses a role, that does not render a conversation as its beginning plus
            what follows, or that leaves out words of the assistant.
    """
    segments: list[Segment] = []
    done = ""
    for turn, message in enumerate(messages):
        if not _is_learned(message) or turn < answers_from:
            continue
        prompt = render(messages[:turn], tokenizer, add_generation_prompt=True)
        whole = render(messages[: turn + 1], tokenizer, add_generation_prompt=False)
        if not prompt.startswith(done) or not whole.startswith(prompt):
            raise InputError(
                "The tokenizer's chat template does not render a conversation as its beginning plus what follows, so the "
                "assistant's words cannot be told from the rest. Use prompt and completion fields instead of messages."
            )
        answer = whole.removeprefix(prompt)
        if message["content"].strip() not in answer:
            raise InputError(
                f"The tokenizer's chat template leaves out words of the assistant: {message['content']!r:.60} became "
                f"{answer!r:.60}. Use prompt and completion fields instead of messages, or another chat template."
            )
        end = answer.rfind(tokenizer.eos_token) + len(tokenizer.eos_token) if tokenizer.eos_token in answer else len(answer)
        segments += [Segment(prompt.removeprefix(done), False), Segment(answer[:end], True), Segment(answer[end:], False)]
        done = whole
    # what follows the last supervised word teaches nothing; that the answer ends must be taught, template or no template
    last = segments[-2].text
    ended = last if last.endswith(tokenizer.eos_token) else last + tokenizer.eos_token
    return [*segments[:-2], Segment(ended, True)]


def until_last_answer(messages: Sequence[Message]) -> Sequence[Message]:
    """The messages up to the last that is supervised; what follows it teaches nothing."""
    return messages[: max(turn for turn, message in enumerate(messages) if _is_learned(message)) + 1]


def render(messages: Sequence[Message], tokenizer: Any, *, add_generation_prompt: bool) -> str:
    """The text that the tokenizer's chat template makes of `messages`."""
    if not tokenizer.chat_template:
        raise InputError("Rows with messages need a tokenizer with a chat template, and this one has none.")
    apply: Callable[..., str] = tokenizer.apply_chat_template
    try:
        return apply(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt)
    except jinja2.TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(f"The tokenizer's chat template refuses a conversation of {roles}: {error}") from error


def check_messages(messages: Any, where: str, answers_from: int = 0) -> None:
    """Raise `InputError`, beginning with `where`, unless `messages` is a conversation that the assistant takes part in.

    An answer marked `weight: 0` or `train: false` is not learned from; one at least must be, from message `answers_from` on.
    """
    well_formed = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not well_formed or not messages:
        raise InputError(f"{where}: not a list of objects with the texts role and content.")
    for message in messages:
        if message.get("weight") not in (None, 0, 1) or message.get("train") not in (None, False, True):
            marks = {name: message[name] for name in ("weight", "train") if name in message}
            raise InputError(f"{where}: a message is marked {marks}: weight may be 0 or 1, train true or false.")
    if not any(_is_learned(message) for message in messages[answers_from:]):
        raise InputError(f"{where}: no message is the assistant's, to be learned: nothing to learn from.")
    if messages[0]["role"] == "assistant":
        raise InputError(f"{where}: the first message is the assistant's, who has nothing to answer.")


def from_sharegpt(turns: Any, where: str, system: Any = None) -> list[Message]:
    """ShareGPT's {from, value} as {role, content}, after the row's `system` text, if any.

    Raises `InputError`, beginning with `where`, if they are something else.
    """
    if not isinstance(turns, list) or not all(isinstance(turn, dict) and {"from", "value"} <= turn.keys() for turn in turns):
        raise InputError(f"{where}: not a list of objects with the texts from and value.")
    unknown = sorted({str(turn["from"]) for turn in turns} - _SHAREGPT_ROLES.keys())
    if unknown:
        raise InputError(f"{where}: nobody knows who {', '.join(map(repr, unknown))} is: use {', '.join(_SHAREGPT_ROLES)}.")
    messages = [
        {"role": _SHAREGPT_ROLES[turn["from"]], "content": turn["value"]}
        | {name: turn[name] for name in ("weight", "train") if name in turn}
        for turn in turns
    ]
    if system in (None, ""):
        return messages
    if not isinstance(system, str):
        raise InputError(f"{where}: the row's system field {system!r:.60} is not text.")
    if messages and messages[0]["role"] == "system":
        raise InputError(f"{where}: begins with a system message, and the row has a system field: leave one of them out.")
    return [{"role": "system", "content": system}, *messages]


def _is_learned(message: Message) -> bool:
    return message["role"] == "assistant" and message.get("weight") != 0 and message.get("train") is not False
