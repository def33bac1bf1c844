"""What a row says: which text the model is given and which text it is to learn.

A row becomes segments, each text either supervised or not. Segments are tokenized apart and joined, so that in training
the model sees a prompt's tokens exactly as it will see them when it answers. (From a conversation's second turn on, that
holds if the template's turns begin and end with tokens of their own, as templates with special tokens do.)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jinja2

from bonetune.errors import InputError

# The papers' training prompt (arXiv 2409.15371, after Alpaca and MetaMath).
PAPER_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)

Kind = Literal["prompt-completion", "instruction", "messages"]


@dataclass(frozen=True)
class Segment:
    """A piece of an example's text, and whether the model is trained to write it."""

    text: str
    supervised: bool


@dataclass(frozen=True)
class RowFormat:
    """How to read a row.

    Args:
        kind: `prompt-completion` (fields prompt, completion), `instruction` (`fields` put into `template`), or `messages`
            (a list of {role, content}, rendered by the tokenizer's chat template; the assistant's words are supervised).
        fields: names of the fields used.
        template: for `instruction`, the prompt with `{instruction}` in it.
    """

    kind: Kind
    fields: tuple[str, ...]
    template: str = PAPER_PROMPT

    @classmethod
    def detect(
        cls, row: dict[str, Any], dataset_field: Sequence[str] | None = None, template: str = PAPER_PROMPT
    ) -> "RowFormat":
        """The format of a data set, from its first row and the fields that the user names.

        Raises `InputError` listing the row's fields if there is no format they fit.
        """
        if dataset_field is not None:
            found = cls("instruction", tuple(dataset_field), template)
        elif "messages" in row:
            found = cls("messages", ("messages",))
        elif "prompt" in row and "completion" in row:
            found = cls("prompt-completion", ("prompt", "completion"))
        else:
            raise InputError(
                f"Rows with the fields {', '.join(row) or '(none)'} fit no known format: name the question's and the answer's "
                "field (dataset_field: [query, response]), or use the fields prompt and completion, or messages."
            )
        found.check(row, 1)
        return found

    def __post_init__(self) -> None:
        if self.kind == "instruction" and len(self.fields) != 2:
            raise InputError(f"dataset_field names two fields, the question's and the answer's, not {list(self.fields)}.")
        if self.kind == "instruction" and "{instruction}" not in self.template:
            raise InputError(f"prompt_template {self.template!r:.60} lacks {{instruction}}: every prompt would be the same.")

    def check(self, row: dict[str, Any], number: int) -> None:
        """Raise `InputError` if row `number` lacks a field, or holds something else than text in it."""
        for name in self.fields:
            if name not in row:
                raise InputError(f"Row {number} has no field {name!r}: its fields are {', '.join(row) or '(none)'}.")
            if self.kind == "messages":
                _check_messages(row[name], number)
            elif not isinstance(row[name], str):
                raise InputError(f"Row {number}, field {name!r}: {row[name]!r:.60} is not text.")

    def segments(self, row: dict[str, Any], tokenizer: Any) -> list[Segment]:
        """The row's text in pieces. The end-of-text token stands at the end of the last supervised piece."""
        match self.kind:
            case "messages":
                return _conversation(row[self.fields[0]], tokenizer)
            case "instruction":
                instruction, response = (row[name] for name in self.fields)
                prompt = self.template.replace("{instruction}", instruction)
            case _:
                prompt, response = (row[name] for name in self.fields)
        return [Segment(prompt, False), Segment(response.removesuffix(tokenizer.eos_token) + tokenizer.eos_token, True)]

    def question_and_answer(self, row: dict[str, Any], tokenizer: Any) -> tuple[str, str]:
        """The text before the last supervised piece, and the answer expected there, without the end-of-text token."""
        if self.kind == "messages":
            *before, last = row[self.fields[0]]
            return _render(before, tokenizer, add_generation_prompt=True), last["content"]
        prompt, completion = self.segments(row, tokenizer)
        return prompt.text, completion.text.removesuffix(tokenizer.eos_token)


def _check_messages(messages: Any, number: int) -> None:
    well_formed = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not well_formed or not messages:
        raise InputError(f"Row {number}, field 'messages': not a list of objects with the texts role and content.")
    if messages[-1]["role"] != "assistant":
        raise InputError(f"Row {number}, field 'messages': the last message is not the assistant's: nothing to learn from.")
    if messages[0]["role"] == "assistant":
        raise InputError(f"Row {number}, field 'messages': the first message is the assistant's, who has nothing to answer.")


def _conversation(messages: list[dict[str, str]], tokenizer: Any) -> list[Segment]:
    """Supervise what the chat template puts between its prompt for the assistant and the end of the assistant's turn."""
    segments: list[Segment] = []
    done = ""
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(messages[:turn], tokenizer, add_generation_prompt=True)
        whole = _render(messages[: turn + 1], tokenizer, add_generation_prompt=False)
        if not prompt.startswith(done) or not whole.startswith(prompt):
            raise InputError(
                "The tokenizer's chat template does not render a conversation as its beginning plus what follows, so the "
                "assistant's words cannot be told from the rest. Use prompt and completion fields instead of messages."
            )
        answer = whole.removeprefix(prompt)
        end = answer.rfind(tokenizer.eos_token) + len(tokenizer.eos_token) if tokenizer.eos_token in answer else len(answer)
        segments += [Segment(prompt.removeprefix(done), False), Segment(answer[:end], True), Segment(answer[end:], False)]
        done = whole
    # what follows the last supervised word teaches nothing; that the answer ends must be taught, template or no template
    last = segments[-2].text
    ended = last if last.endswith(tokenizer.eos_token) else last + tokenizer.eos_token
    return [*segments[:-2], Segment(ended, True)]


def _render(messages: list[dict[str, str]], tokenizer: Any, *, add_generation_prompt: bool) -> str:
    if not tokenizer.chat_template:
        raise InputError("Rows with messages need a tokenizer with a chat template, and this one has none.")
    render: Callable[..., str] = tokenizer.apply_chat_template
    try:
        return render(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except jinja2.TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(f"The tokenizer's chat template refuses a conversation of {roles}: {error}") from error
