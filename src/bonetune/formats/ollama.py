"""An Ollama Modelfile beside a GGUF file: the model's chat template in Go's template language, its system prompt, its ends.

Jinja templates are programs and are not translated. What one writes between the messages is read off a few conversations that
it renders, and other conversations must come out the same.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from bonetune.errors import InputError
from bonetune.files import write_text
from bonetune.formats.checkpoint import local_folder
from bonetune.models import load_tokenizer

Message = dict[str, str]
_CONVERSATIONS = (
    ("user",),
    ("user", "assistant", "user"),
    ("user", "assistant", "user", "assistant", "user"),
)
_TEXTS = ("What is one plus two?", "Three.", "Größer: 2 > 1\n\n* and <b>?", "Yes, {it} is 100% so", "Go on, 再见")
# What is never cut in two: `<|im_start|>`, `[INST]`, words.
_PIECES = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]|\w+|\s|.")
_SYSTEM = "Answer in one word.\nBe kind."


@dataclass(frozen=True)
class ChatFormat:
    """What a chat template writes around the messages of a conversation, which ends with the user's and the prompt to answer.

    Args:
        before: by role, what stands before a message.
        after: by role, what stands after it.
        opening: what stands before a user's message that is the first of all.
        ending: what stands after the user's last message, before the answer.
        default_system: the system prompt of conversations that have none.
        system: `first`, it is a message; `last`, it stands at the beginning of the user's last message; None: it is refused.
        between: with `last`, what stands between the system prompt and the user's message.
    """

    before: dict[str, str]
    after: dict[str, str]
    opening: str = ""
    ending: str = ""
    default_system: str | None = None
    system: str | None = "first"
    between: str = ""

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt that a conversation becomes."""
        messages = list(messages)
        if self.default_system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.default_system})
        system = messages[0]["content"] if messages[0]["role"] == "system" else None
        text = self.opening if system is None or self.system != "first" else ""
        for number, message in enumerate(messages):
            role, content = message["role"], message["content"]
            if role == "system" and self.system != "first":
                continue
            if self.system == "last" and system is not None and number == len(messages) - 1:
                content = system + self.between + content
            text += self.before[role] + content + self.after[role]
        return text + self.ending

    def go_template(self) -> str:
        """The same in Go's template language, on the values that Ollama gives."""
        user = "{{ .Content }}"
        if self.system == "last":
            user = "{{ if and $.System (eq (len (slice $.Messages $i)) 1) }}{{ $.System }}" + self.between + "{{ end }}" + user
        opening, first = self.opening, ""
        if self.system == "first" and opening:
            opening, first = "", "{{ if eq $i 0 }}" + opening + "{{ end }}"
        system = self.before["system"] + "{{ .Content }}" + self.after["system"] if self.system == "first" else ""
        return (
            opening
            + '{{ range $i, $m := .Messages }}{{ if eq .Role "user" }}'
            + first
            + self.before["user"]
            + user
            + self.after["user"]
            + '{{ else if eq .Role "assistant" }}'
            + self.before["assistant"]
            + "{{ .Content }}"
            + self.after["assistant"]
            + ('{{ else if eq .Role "system" }}' + system if system else "")
            + "{{ end }}{{ end }}"
            + self.ending
        )


@dataclass(frozen=True)
class Modelfile:
    """What was written.

    Args:
        text: the file.
        format: what its TEMPLATE and SYSTEM are made from; None: it has none, and Ollama takes what it finds in the GGUF file.
        notes: in what Ollama's prompts will differ from the tokenizer's chat template.
    """

    text: str
    format: ChatFormat | None
    notes: tuple[str, ...]


def write_modelfile(output: Path, model: str, gguf: str, adapter: str | None = None) -> Modelfile:
    """Write a Modelfile, for `ollama create NAME -f Modelfile`.

    Args:
        output: the file.
        model: the model in the Hugging Face layout, whose tokenizer and chat template it is to be.
        gguf: the GGUF file of that model, or of an adapter's base model, as the Modelfile is to name it: relative to itself.
        adapter: a LoRA-GGUF file of the adapter, likewise.

    Raises:
        InputError: there is no such model, or a name of a file that a Modelfile cannot hold.
    """
    folder = local_folder(model)
    tokenizer = load_tokenizer(str(folder))
    for name in (gguf, adapter):
        if name is not None and (not name.strip() or any(mark in name for mark in '\n\r"')):
            raise InputError(f"A Modelfile cannot name the file {name!r}.")
    found, notes = chat_format(tokenizer)
    lines = [f"FROM {_path(gguf)}"] + ([] if adapter is None else [f"ADAPTER {_path(adapter)}"])
    if found is not None:
        lines.append(f'TEMPLATE """{found.go_template()}"""')
        if found.default_system is not None:
            lines.append(f'SYSTEM """{found.default_system}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in _stops(tokenizer, folder, found)]
    text = "\n".join(lines) + "\n"
    write_text(output, text)
    return Modelfile(text, found, notes)


def chat_format(tokenizer: Any) -> tuple[ChatFormat | None, tuple[str, ...]]:
    """What a tokenizer's chat template writes around messages; None if no `ChatFormat` renders the same. And notes about it."""
    if not tokenizer.chat_template:
        return None, ("the tokenizer has no chat template; the Modelfile has no TEMPLATE",)
    bos = tokenizer.bos_token if tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] else None
    notes = []
    from jinja2 import TemplateError

    def rendered(messages: Sequence[Message]) -> str | None:
        """By transformers, less the token that llama.cpp puts before every prompt."""
        try:
            text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError, ValueError):  # so templates refuse a conversation
            return None
        return text.removeprefix(bos) if bos else text

    found = next((guess for guess in _guesses(rendered) if _same(guess, rendered)), None)
    if found is None:
        return None, ("no TEMPLATE of Go's language was found that renders as the tokenizer's chat template does",)
    if found.system is None:
        notes.append("the chat template has no system messages; the Modelfile leaves them out")
    if bos and not tokenizer.apply_chat_template([_message("user", "a")], tokenize=False).startswith(bos):
        notes.append(f"llama.cpp puts {bos} before the prompt; the chat template does not")
    if "strftime_now" in str(tokenizer.chat_template):
        notes.append("the chat template writes the current date; the TEMPLATE has today's")
    if any(mark in found.go_template() + (found.default_system or "") for mark in ('"""',)) or _has_braces(found):
        return None, ("the chat template writes characters that a Modelfile cannot hold",)
    return found, tuple(notes)


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _guesses(rendered: Any) -> list[ChatFormat]:
    """Formats that agree with the template on the conversations they are read off."""
    marks = [f"Mark{number}Mark" for number in range(4)]
    user, assistant, again = _message("user", marks[1]), _message("assistant", marks[2]), _message("user", marks[3])
    pieces = _cut(rendered([user, assistant, again]), marks[1:])
    if pieces is None:
        return []
    start, answer, next_user, end = pieces
    with_system = _cut(rendered([_message("system", marks[0]), user]), marks[:2])
    if with_system is None:
        return [_format(start, answer, next_user, end)]
    system_start, system_user, _ = with_system
    guesses = [_format(start, answer, next_user, end, system_start, system_user)]
    plain = _format(start, answer, next_user, end)
    guesses.append(replace(plain, system="last", between=system_user))
    default = start.removeprefix(system_start).removesuffix(system_user)
    if len(default) == len(start) - len(system_start) - len(system_user) > 0:
        guesses.insert(0, _with_default(default, answer, next_user, end, system_start, system_user))
    return guesses


def _format(
    start: str, answer: str, next_user: str, end: str, system_start: str | None = None, system_user: str | None = None
) -> ChatFormat:
    """From what stands before the first message, between messages, and after the last.

    How a text between two messages is divided among them makes no difference to what is rendered.
    """
    before_users = [text for text in (start, next_user, system_user) if text is not None]
    user = _common_suffix(before_users)
    return _divided(user, start, answer, next_user, end, system_start, system_user)


def _with_default(default: str, answer: str, next_user: str, end: str, system_start: str, system_user: str) -> ChatFormat:
    # messages begin alike, whosever they are: `<|im_start|>`
    cuts = [next_user[cut:] for cut in range(len(next_user) + 1)]
    user = max(cuts, key=lambda rest: len(_shared([rest, system_start])))
    if not system_user.endswith(user):
        user = _common_suffix([next_user, system_user])
    found = _divided(user, user, answer, next_user, end, system_start, system_user)
    return replace(found, default_system=default)


def _divided(
    user: str, start: str, answer: str, next_user: str, end: str, system_start: str | None, system_user: str | None
) -> ChatFormat:
    after_answer = next_user.removesuffix(user)
    after_user = _common_prefix([answer, end, after_answer] if after_answer else [answer, end])
    before = {"user": user, "assistant": answer.removeprefix(after_user), "system": system_start or ""}
    after = {"user": after_user, "assistant": after_answer, "system": (system_user or "").removesuffix(user)}
    system = None if system_start is None else "first"
    return ChatFormat(before, after, start.removesuffix(user), end.removeprefix(after_user), system=system)


def _same(found: ChatFormat, rendered: Any) -> bool:
    """Whether a format renders conversations as the template does, and refuses what it refuses."""
    for roles in _CONVERSATIONS:
        messages = [_message(role, text) for role, text in zip(roles, _TEXTS, strict=False)]
        if rendered(messages) != found.render(messages):
            return False
        with_system = [_message("system", _SYSTEM), *messages]
        if found.system is not None and rendered(with_system) != found.render(with_system):
            return False
    return True


def _cut(text: str | None, marks: Sequence[str]) -> list[str] | None:
    """What stands around the marks; None if one of them is not there once, and in this order."""
    if text is None or any(text.count(mark) != 1 for mark in marks):
        return None
    pieces = re.split("|".join(marks), text)
    rejoined = "".join(piece + mark for piece, mark in zip(pieces, [*marks, ""], strict=True))
    return pieces if rejoined == text else None


def _common_prefix(texts: Sequence[str]) -> str:
    return "".join(_shared([_PIECES.findall(text) for text in texts]))


def _common_suffix(texts: Sequence[str]) -> str:
    return "".join(_shared([_PIECES.findall(text)[::-1] for text in texts])[::-1])


def _shared(sequences: Sequence[Sequence[str]]) -> list[str]:
    """The elements with which all sequences begin."""
    columns = zip(*sequences, strict=False)
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]


def _has_braces(found: ChatFormat) -> bool:
    pieces = [*found.before.values(), *found.after.values(), found.opening, found.ending, found.between]
    return any("{{" in piece or "}}" in piece for piece in pieces)


def _stops(tokenizer: Any, folder: Path, found: ChatFormat | None) -> list[str]:
    """The texts at which an answer ends: of the model's tokens, and of the one that the template puts after an answer."""
    from transformers import GenerationConfig

    own: Any = []
    if (folder / "generation_config.json").is_file():
        own = GenerationConfig.from_pretrained(str(folder)).eos_token_id
    own = [] if own is None else own if isinstance(own, list) else [own]
    tokens = [tokenizer.eos_token, *tokenizer.convert_ids_to_tokens(own)]
    if found is not None:
        after = found.after["assistant"].lstrip()
        tokens += [token for token in tokenizer.all_special_tokens if after.startswith(token)]
    return sorted({token for token in tokens if token and '"' not in token})


def _path(name: str) -> str:
    # without one, `ollama create` would look the name up as a model's
    return name if name.startswith((".", "/", "~")) else f"./{name}"
