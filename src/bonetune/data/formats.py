"""What a row says: which text the model is given and which text it is to learn.

A row becomes segments, each text either supervised or not. `bonetune.data.tokens` makes tokens of them.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from bonetune.data.conversation import (
    Message,
    Segment,
    check_messages,
    conversation_segments,
    from_sharegpt,
    render,
    until_last_answer,
)
from bonetune.errors import InputError

# The papers' training prompt (arXiv 2409.15371, after Alpaca and MetaMath).
PAPER_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)

# What a template may ask for; braces after a letter or another brace are mathematics: \\boxed{answer}.
_FILLED, _PLACEHOLDER = re.compile(r"\{(instruction|input)\}"), re.compile(r"(?<![\w}])\{([A-Za-z_]\w*)\}")

Kind = Literal["prompt-completion", "instruction", "alpaca", "sharegpt", "messages", "text", "tokens", "classification"]
TaskName = Literal["CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM"]
# What each kind's fields are: the names they have if the user names none, and what they are called in messages.
_FIELDS: dict[Kind, tuple[tuple[str, ...], str]] = {
    "messages": (("messages",), "the conversation's field"),
    "sharegpt": (("conversations",), "the conversation's field"),
    "prompt-completion": (("prompt", "completion"), "the prompt's and the completion's field"),
    "alpaca": (("instruction", "input", "output"), "the instruction's, the input's and the output's field"),
    "text": (("text",), "the text's field"),
    "tokens": (("input_ids",), "the token ids' field"),
    "instruction": ((), "two fields, the question's and the answer's"),
    "classification": ((), "the text's field (or two texts') and the label's"),
}
_TEXTS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("text",), ("sentence",))


@dataclass(frozen=True)
class RowFormat:
    """How to read a row.

    Args:
        kind: `prompt-completion` (texts, or lists of messages), `instruction` (a question put into `template`, an answer),
            `alpaca` (an instruction and an output; its input, if any, stands under "### Input:", or where `template` has
            `{input}`),
            `messages` (a list of {role, content}, rendered by the tokenizer's chat template; the assistant's words are
            supervised), `sharegpt` (the same as {from, value}), `text` (all of it supervised), `tokens` (a text's token ids,
            taken as they are), or `classification` (one or two texts and a label).
        fields: names of the fields used, in the order of these words.
        template: the prompt with `{instruction}` in it; for `alpaca` with three fields, also `{input}`.
    """

    kind: Kind
    fields: tuple[str, ...]
    template: str = PAPER_PROMPT

    @classmethod
    def detect(
        cls,
        row: dict[str, Any],
        dataset_field: Sequence[str] | None = None,
        template: str = PAPER_PROMPT,
        kind: Kind | Literal["auto"] = "auto",
        task_type: TaskName = "CAUSAL_LM",
    ) -> "RowFormat":
        """The format of a data set, from its first row and what the user says.

        Args:
            row: the first row.
            dataset_field: names of the fields, in the order that `RowFormat` describes. Without a `kind`, two are a question
                and an answer, one is a text, and for SEQ_CLS they are the text or texts and the label.
            template: the prompt of instructions.
            kind: the format, or `auto`.
            task_type: what the model is for.

        Raises:
            InputError: there is no format that the row fits, listing its fields; or a format that the task cannot learn from;
                or token ids beside labels that would not be heeded.
        """
        if dataset_field is not None and not dataset_field:
            raise InputError("dataset_field is empty: name the fields, or leave it out.")
        chosen = _kind(row, dataset_field, task_type) if kind == "auto" else kind
        _check_task(chosen, task_type)
        fields = tuple(dataset_field) if dataset_field is not None else _default_fields(chosen, row)
        found = cls(chosen, fields, template)
        found.check(row, 1)
        return found

    def __post_init__(self) -> None:
        names, words = _FIELDS[self.kind]
        counts = {"instruction": (2,), "classification": (2, 3), "alpaca": (2, 3)}.get(self.kind, (len(names),))
        if len(self.fields) not in counts:
            raise InputError(f"dataset_field names {words}, not {list(self.fields)}.")
        if self.kind in ("instruction", "alpaca") and "{instruction}" not in self.template:
            raise InputError(f"prompt_template {self.template!r:.60} lacks {{instruction}}: every prompt would be the same.")
        if self.kind in ("instruction", "alpaca"):
            filled = {"instruction", "input"} if self._has_input else {"instruction"}
            if unknown := sorted(set(_PLACEHOLDER.findall(self.template)) - filled):
                raise InputError(
                    f"prompt_template {self.template!r:.60} has {{{unknown[0]}}}, which rows of {self.kind} cannot fill: use "
                    f"{' and '.join(f'{{{name}}}' for name in sorted(filled, reverse=True))} only."
                )

    def check(self, row: dict[str, Any], number: int) -> None:
        """Raise `InputError` if row `number` lacks a field, or holds something else than it should in it."""
        optional = self.fields[1:2] if self._has_input else ()
        for name in self.fields:
            if name not in row and name not in optional:
                raise InputError(f"Row {number} has no field {name!r}: its fields are {', '.join(row) or '(none)'}.")
        if self.is_conversation(row):
            check_messages(self._messages(row, number), f"Row {number}, field {self.fields[-1]!r}", self._answers_from(row))
            return
        if self.kind == "tokens":
            _check_ids(row[self.fields[0]], f"Row {number}, field {self.fields[0]!r}")
            return
        texts = self.fields[:-1] if self.kind == "classification" else self.fields
        for name in texts:
            if not isinstance(row.get(name), str) and not (name in optional and row.get(name) is None):
                raise InputError(f"Row {number}, field {name!r}: {row[name]!r:.60} is not text.")
        if self.kind == "classification":
            label = row[self.fields[-1]]
            if not isinstance(label, str | int | float) or (isinstance(label, float) and not math.isfinite(label)):
                raise InputError(f"Row {number}, field {self.fields[-1]!r}: {label!r:.60} is neither a class nor a number.")
            if isinstance(label, str) and not label.strip():
                raise InputError(f"Row {number}, field {self.fields[-1]!r}: the label {label!r} is blank: fill it in.")

    def segments(self, row: dict[str, Any], tokenizer: Any) -> list[Segment]:
        """The text of a row that has one in pieces. The end-of-text token stands at the end of the last supervised piece."""
        end = tokenizer.eos_token
        if self.is_conversation(row):
            return conversation_segments(self._messages(row), tokenizer, self._answers_from(row))
        if self.kind == "text":
            return [Segment(row[self.fields[0]].removesuffix(end) + end, True)]
        prompt, answer = self._prompt_and_answer(row)
        return [Segment(prompt, False), Segment(answer.removesuffix(end) + end, True)]

    def question_and_answer(self, row: dict[str, Any], tokenizer: Any) -> tuple[str, str]:
        """The text before the last supervised piece, and the answer expected there, without the end-of-text token.

        Raises `InputError` for formats without questions: plain text, token ids and classification.
        """
        if self.is_conversation(row):
            *before, last = until_last_answer(self._messages(row))
            return render(before, tokenizer, add_generation_prompt=True), last["content"]
        if self.is_plain or self.kind == "classification":
            raise InputError(f"Rows of {self.kind} have no question and answer: use rows with prompt and completion.")
        prompt, answer = self._prompt_and_answer(row)
        return prompt, answer.removesuffix(tokenizer.eos_token)

    @property
    def is_plain(self) -> bool:
        """Whether rows are a text, or its token ids, without a question in it."""
        return self.kind in ("text", "tokens")

    def is_blank(self, row: dict[str, Any]) -> bool:
        """Whether a plain row has nothing to learn: a text of white space, or no token that follows another."""
        content = row[self.fields[0]]
        return self.is_plain and (not content.strip() if self.kind == "text" else len(content) < 2)

    def is_conversation(self, row: dict[str, Any]) -> bool:
        """Whether the row is rendered by the chat template."""
        of_messages = self.kind == "prompt-completion" and any(isinstance(row[name], list) for name in self.fields)
        return self.kind in ("messages", "sharegpt") or of_messages

    def _messages(self, row: dict[str, Any], number: int = 0) -> list[Message]:
        first = row[self.fields[0]]
        if self.kind == "sharegpt":
            return from_sharegpt(first, f"Row {number}, field {self.fields[0]!r}", row.get("system"))
        if self.kind == "messages":
            return first
        if not all(isinstance(row[name], list) for name in self.fields):
            raise InputError(f"Row {number}: {' and '.join(self.fields)} are not both texts or both lists of messages.")
        return [*first, *row[self.fields[1]]]

    def _answers_from(self, row: dict[str, Any]) -> int:
        """Number of the first message that may be supervised."""
        return len(row[self.fields[0]]) if self.kind == "prompt-completion" else 0

    @property
    def _has_input(self) -> bool:
        return self.kind == "alpaca" and len(self.fields) == 3

    def _prompt_and_answer(self, row: dict[str, Any]) -> tuple[str, str]:
        asked, answer = row[self.fields[0]], row[self.fields[-1]]
        if self.kind == "prompt-completion":
            return asked, answer
        given = (row.get(self.fields[1]) or "") if self._has_input else ""
        if given and "{input}" not in self.template:
            asked += f"\n\n### Input:\n{given}"
        said = {"instruction": asked} | ({"input": given} if self._has_input else {})
        # in one go, so that what a row says is never taken for a placeholder
        return _FILLED.sub(lambda found: said.get(found[1], found[0]), self.template), answer


def _kind(row: dict[str, Any], dataset_field: Sequence[str] | None, task_type: TaskName) -> Kind:
    if task_type == "SEQ_CLS":
        return "classification"
    if dataset_field is not None:
        alone = row.get(dataset_field[0]) if len(dataset_field) == 1 else None
        one = "tokens" if isinstance(alone, list | np.ndarray) else "text"
        return one if len(dataset_field) == 1 else "instruction"
    for kind, (names, _) in _FIELDS.items():
        if names and all(name in row for name in names if (kind, name) != ("alpaca", "input")):
            if kind == "tokens" and not np.array_equal(row.get("labels", row[names[0]]), row[names[0]]):
                raise InputError(
                    "Rows have labels beside input_ids, which are not heeded: every token but the first would be learned. Say "
                    "dataset_format: tokens if that is meant; else give prompts and completions as text."
                )
            return kind
    raise InputError(
        f"Rows with the fields {', '.join(row) or '(none)'} fit no known format: name the question's and the answer's field "
        "(dataset_field: [query, response]), or use the fields prompt and completion, messages, conversations, "
        "instruction and output, text, or input_ids."
    )


def _default_fields(kind: Kind, row: dict[str, Any]) -> tuple[str, ...]:
    names, words = _FIELDS[kind]
    if names:
        return names
    for texts in _TEXTS if kind == "classification" and "label" in row else ():
        if all(name in row for name in texts):
            return (*texts, "label")
    raise InputError(f"Rows with the fields {', '.join(row) or '(none)'}: name {words} in dataset_field.")


def _check_task(kind: Kind, task_type: TaskName) -> None:
    if task_type not in get_args(TaskName):
        raise InputError(f"task_type {task_type!r} is unknown: choose from {', '.join(get_args(TaskName))}.")
    if (kind == "classification") != (task_type == "SEQ_CLS"):
        fitting = "classification" if task_type == "SEQ_CLS" else "one of the others"
        raise InputError(f"dataset_format {kind} with task_type {task_type}: choose {fitting}, or another task_type.")
    if kind == "text" and task_type == "SEQ_2_SEQ_LM":
        raise InputError("Plain text has nothing to rewrite (SEQ_2_SEQ_LM): name the prompt's and the answer's field.")
    if kind == "tokens" and task_type != "CAUSAL_LM":
        raise InputError(f"Token ids are for task_type CAUSAL_LM, not {task_type}: name fields with text in them.")


def _check_ids(ids: Any, where: str) -> None:
    """Raise `InputError`, beginning with `where`, unless `ids` is a list or an array of one; what is in it is seen later."""
    if isinstance(ids, np.ndarray):
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise InputError(f"{where}: an array of {ids.dtype} of the shape {ids.shape} is no list of token ids.")
    elif not isinstance(ids, list | tuple):
        raise InputError(f"{where}: {ids!r:.60} is no list of token ids.")
