import json

import numpy as np
import pytest

from bonetune.data import PAPER_PROMPT, RowFormat, Segment
from bonetune.errors import InputError

TURNS = [("system", "be brief"), ("user", "one?"), ("assistant", "two"), ("user", "three?"), ("assistant", "four")]
MESSAGES = [{"role": role, "content": content} for role, content in TURNS]


def test_prompt_and_completion(tokenizer):
    row = {"prompt": "1+1=", "completion": " 2"}
    found = RowFormat.detect(row)
    assert found.segments(row, tokenizer) == [Segment("1+1=", False), Segment(" 2<|im_end|>", True)]
    assert found.question_and_answer(row, tokenizer) == ("1+1=", " 2")


def test_instruction_fields_in_the_papers_prompt(tokenizer):
    row = {"query": "Add {1} and 2.", "response": "3", "prompt": "x", "completion": "y"}
    found = RowFormat.detect(row, ["query", "response"])
    prompt, answer = found.segments(row, tokenizer)
    assert prompt.text == PAPER_PROMPT.replace("{instruction}", "Add {1} and 2.")
    assert prompt.text.endswith("### Instruction:\nAdd {1} and 2.\n\n### Response:")
    assert answer == Segment("3<|im_end|>", True)


@pytest.mark.parametrize(
    ("given", "asked"),
    [("7", "Double it.\n\n### Input:\n7"), ("", "Double it."), (None, "Double it."), ("absent", "Double it.")],
)
def test_alpacas_input_stands_under_the_instruction(tokenizer, given, asked):
    row = {"instruction": "Double it.", "output": "14", "text": "x"} | ({} if given == "absent" else {"input": given})
    found = RowFormat.detect(row, template="Q: {instruction} A:")
    assert found.kind == "alpaca"
    assert found.question_and_answer(row, tokenizer) == (f"Q: {asked} A:", "14")


def test_plain_text_is_supervised_and_ended_once(tokenizer):
    for row, text in (({"text": "a\nb"}, "a\nb"), ({"text": "c<|im_end|>"}, "c")):
        assert RowFormat.detect(row).segments(row, tokenizer) == [Segment(text + "<|im_end|>", True)]
    assert RowFormat.detect({"body": "a"}, ["body"]) == RowFormat("text", ("body",))
    with pytest.raises(InputError, match="Rows of text have no question and answer"):
        RowFormat.detect({"text": "a"}).question_and_answer({"text": "a"}, tokenizer)


def test_token_ids_are_found_by_their_field_or_their_list(tokenizer):
    found = RowFormat.detect({"input_ids": [1, 2], "attention_mask": [1, 1]})
    assert found == RowFormat("tokens", ("input_ids",))
    assert RowFormat.detect({"input_ids": np.asarray([1, 2], np.uint16)}) == found
    assert RowFormat.detect({"ids": [1]}, ["ids"]) == RowFormat.detect({"ids": [1]}, ["ids"], kind="tokens")
    assert RowFormat.detect({"input_ids": [1], "text": "a"}).kind == "text"
    assert found.is_plain
    with pytest.raises(InputError, match="Rows of tokens have no question and answer"):
        found.question_and_answer({"input_ids": [1, 2]}, tokenizer)


def test_a_mask_beside_token_ids_is_not_passed_over_in_silence():
    row = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}
    with pytest.raises(InputError, match=r"labels beside input_ids, which are not heeded.* Say dataset_format: tokens"):
        RowFormat.detect(row)
    assert RowFormat.detect(row, kind="tokens") == RowFormat.detect(row | {"labels": [1, 2, 3]})


def test_one_conversation_in_three_formats(tokenizer):
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    rows = [
        {"messages": MESSAGES},
        {"conversations": [{"from": names[role], "value": content} for role, content in TURNS]},
        {"prompt": MESSAGES[:2], "completion": MESSAGES[2:]},
    ]
    formats = [RowFormat.detect(row) for row in rows]
    assert [found.kind for found in formats] == ["messages", "sharegpt", "prompt-completion"]
    first, *others = [found.segments(row, tokenizer) for found, row in zip(formats, rows, strict=True)]
    assert [s.text for s in first if s.supervised] == ["two<|im_end|>", "four<|im_end|>"]
    rendered = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert "".join(s.text for s in first) == rendered.removesuffix("\n")
    assert others == [first, first]
    question = tokenizer.apply_chat_template(MESSAGES[:-1], tokenize=False, add_generation_prompt=True)
    for found, row in zip(formats, rows, strict=True):
        assert found.question_and_answer(row, tokenizer) == (question, "four")


def test_of_a_conversation_in_the_prompt_only_the_completion_is_learned(tokenizer):
    row = {"prompt": MESSAGES[:4], "completion": MESSAGES[4:]}
    segments = RowFormat.detect(row).segments(row, tokenizer)
    assert [s.text for s in segments if s.supervised] == ["four<|im_end|>"]
    assert "".join(s.text for s in segments) == tokenizer.apply_chat_template(MESSAGES, tokenize=False).removesuffix("\n")


def test_who_speaks_in_sharegpt(tokenizer):
    names = {"human": "user", "tool": "tool", "observation": "tool", "chatgpt": "assistant"}
    row = {"conversations": [{"from": name, "value": name} for name in names]}
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    assert RowFormat.detect(row).question_and_answer(row, tokenizer)[0] == "[user]human[tool]tool[tool]observation"


@pytest.mark.parametrize(
    ("row", "fields", "expected"),
    [
        ({"sentence": "x", "label": 1, "idx": 0}, None, ("sentence", "label")),
        ({"premise": "x", "hypothesis": "y", "label": "no"}, None, ("premise", "hypothesis", "label")),
        ({"text": "x", "label": 0.5}, None, ("text", "label")),
        ({"a": "x", "b": "y", "text": "z", "label": 1}, ["a", "b", "label"], ("a", "b", "label")),
        ({"a": "x", "stars": "5"}, ["a", "stars"], ("a", "stars")),
    ],
)
def test_classification(row, fields, expected):
    assert RowFormat.detect(row, fields, task_type="SEQ_CLS") == RowFormat("classification", expected)


@pytest.mark.parametrize(
    ("kind", "row", "fields"),
    [
        ("text", {"text": "x", "messages": MESSAGES}, None),
        ("prompt-completion", {"q": "x", "a": "y"}, ["q", "a"]),
        ("alpaca", {"q": "x", "a": "y"}, ["q", "a"]),
        ("messages", {"chat": MESSAGES}, ["chat"]),
        ("sharegpt", {"chat": [{"from": "user", "value": "x"}, {"from": "model", "value": "y"}]}, ["chat"]),
    ],
)
def test_a_kind_that_is_named_is_taken_with_fields_that_are_named(kind, row, fields, tokenizer):
    found = RowFormat.detect(row, fields, kind=kind)
    assert found.kind == kind
    assert found.segments(row, tokenizer)[-1].supervised


@pytest.mark.parametrize(
    ("row", "told", "message"),
    [
        ({"body": "x"}, {}, "Rows with the fields body fit no known format"),
        ({"a": "x"}, {"dataset_field": ["a", "b"]}, "Row 1 has no field 'b': its fields are a"),
        ({"a": "x"}, {"dataset_field": []}, "dataset_field is empty"),
        ({"a": "x"}, {"dataset_field": ["a", "b", "c"]}, "dataset_field names two fields, the question's and the answer's"),
        ({"a": "x"}, {"dataset_field": ["a"], "kind": "prompt-completion"}, "dataset_field names the prompt's and"),
        (
            {"a": "x"},
            {"kind": "instruction"},
            "Rows with the fields a: name two fields, the question's",
        ),
        ({"a": "x"}, {"kind": "text"}, "Row 1 has no field 'text': its fields are a"),
        ({"prompt": 1, "completion": "x"}, {}, "Row 1, field 'prompt': 1 is not text"),
        ({"instruction": "x", "input": 1, "output": "x"}, {}, "Row 1, field 'input': 1 is not text"),
        ({"text": None}, {}, "Row 1, field 'text': None is not text"),
        ({"messages": "hello"}, {}, "not a list of objects"),
        ({"messages": []}, {}, "not a list of objects"),
        ({"messages": [{"role": "user", "content": "x"}]}, {}, "no message is the assistant's"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, {}, "the first message is the assistant's"),
        ({"prompt": "x", "completion": MESSAGES}, {}, "Row 1: prompt and completion are not both texts or both lists"),
        ({"conversations": ["x"]}, {}, "Row 1, field 'conversations': not a list of objects with the texts from and value"),
        ({"conversations": [{"from": "cat", "value": "x"}]}, {}, "nobody knows who 'cat' is: use system, human"),
        ({"conversations": [{"from": "human", "value": 1}, {"from": "gpt", "value": "x"}]}, {}, "not a list of objects"),
        (
            {"a": "x", "label": 1},
            {"task_type": "SEQ_CLS"},
            r"name the text's field \(or two texts'\) and the label's in dataset_f",
        ),
        ({"text": "x", "label": None}, {"task_type": "SEQ_CLS"}, "field 'label': None is neither a class nor a number"),
        ({"text": "x", "label": float("nan")}, {"task_type": "SEQ_CLS"}, "nan is neither a class nor a number"),
        ({"text": 3, "label": 1}, {"task_type": "SEQ_CLS"}, "field 'text': 3 is not text"),
        ({"text": "x"}, {"kind": "classification"}, "classification with task_type CAUSAL_LM: choose one of the others"),
        ({"text": "x"}, {"kind": "text", "task_type": "SEQ_CLS"}, "text with task_type SEQ_CLS: choose classification"),
        ({"text": "x"}, {"task_type": "SEQ_2_SEQ_LM"}, "Plain text has nothing to rewrite"),
        ({"input_ids": "1 2"}, {}, "Row 1, field 'input_ids': '1 2' is no list of token ids"),
        ({"input_ids": 3}, {"kind": "tokens"}, "Row 1, field 'input_ids': 3 is no list of token ids"),
        ({"input_ids": np.ones(2)}, {}, r"an array of float64 of the shape \(2,\) is no list"),
        ({"input_ids": np.ones((2, 2), int)}, {}, r"an array of int64 of the shape \(2, 2\) is no list"),
        ({"input_ids": [1]}, {"task_type": "SEQ_2_SEQ_LM"}, "Token ids are for task_type CAUSAL_LM, not SEQ_2_SEQ_LM"),
        ({"input_ids": [1]}, {"kind": "tokens", "task_type": "SEQ_CLS"}, "tokens with task_type SEQ_CLS: choose class"),
        ({"text": "x"}, {"task_type": "TOKEN_CLS"}, "task_type 'TOKEN_CLS' is unknown"),
    ],
)
def test_rows_that_do_not_fit(row, told, message):
    with pytest.raises(InputError, match=message):
        RowFormat.detect(row, **told)


def test_messages_need_a_chat_template(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="need a tokenizer with a chat template"):
        RowFormat("messages", ("messages",)).segments({"messages": MESSAGES}, tokenizer)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}", "cannot be told from the rest"),
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "leaves out words of the assistant: 'two' became 'assistant'"),
        ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}", "leaves out words of the assistant"),
        ("{{ raise_exception('System role not supported') }}", "refuses a conversation of system, user: System role not supp"),
    ],
)
def test_a_template_that_cannot_be_learned_from_is_refused(tokenizer, template, message):
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=message):
        RowFormat("messages", ("messages",)).segments({"messages": MESSAGES}, tokenizer)


def test_a_template_that_forgets_earlier_thoughts_is_refused_and_one_that_trims_is_not(tokenizer):
    kept = "{{ m['content'] if loop.last else m['content'].split('</think>') | last }}"
    for inside, whole in (("{{ m['content'] | trim }}", True), (kept, False)):
        tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}]" + inside + "{% endfor %}"
        if not whole:
            tokenizer.chat_template += "{% if add_generation_prompt %}[assistant]{% endif %}"
        answers = [{"role": "assistant", "content": " <think>so</think>two "}, MESSAGES[1]]
        row = {"messages": [MESSAGES[1], *answers, {"role": "assistant", "content": "four"}]}
        found = RowFormat("messages", ("messages",))
        if whole:
            assert any("<think>so</think>two" in s.text for s in found.segments(row, tokenizer) if s.supervised)
        else:
            with pytest.raises(InputError, match="does not render a conversation as its beginning plus what follows"):
                found.segments(row, tokenizer)


def test_a_prompt_template_without_a_place_for_the_instruction_is_refused():
    for row, fields in (({"a": "x", "b": "y"}, ["a", "b"]), ({"instruction": "x", "output": "y"}, None)):
        with pytest.raises(InputError, match=r"lacks \{instruction\}"):
            RowFormat.detect(row, fields, "Hello")


def test_a_template_without_an_end_of_text_still_teaches_the_end(tokenizer):
    turns = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}assistant: {% endif %}"
    row = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
    assert RowFormat.detect(row).segments(row, tokenizer)[-1] == Segment("y\n<|im_end|>", True)


def test_an_answer_that_ends_itself_ends_once(tokenizer):
    row = {"prompt": "1+1=", "completion": " 2<|im_end|>"}
    assert RowFormat.detect(row).segments(row, tokenizer)[-1].text == " 2<|im_end|>"


def test_rows_are_left_as_they_are(tokenizer):
    row = {"prompt": MESSAGES[:4], "completion": MESSAGES[4:]}
    before = json.dumps(row)
    RowFormat.detect(row).segments(row, tokenizer)
    assert json.dumps(row) == before


@pytest.mark.parametrize(("given", "filled"), [("{instruction}", "{instruction}"), (None, "")])
def test_a_template_with_a_place_for_the_input(tokenizer, given, filled):
    row = {"instruction": "Do {input}.", "input": given, "output": "x"}
    found = RowFormat.detect(row, template='{"a": 1} {instruction}|{input} \\boxed{answer}')
    assert found.question_and_answer(row, tokenizer)[0] == '{"a": 1} Do {input}.|' + filled + " \\boxed{answer}"


@pytest.mark.parametrize(
    ("fields", "kind", "template", "word"),
    [
        (("q", "a"), "instruction", "{instruction} {input}", "input"),
        (("q", "a"), "alpaca", "{instruction} {input}", "input"),
        (("q", "i", "a"), "alpaca", "{instruction} {input} {output}", "output"),
    ],
)
def test_a_placeholder_that_nothing_fills_is_refused(fields, kind, template, word):
    with pytest.raises(InputError, match=rf"has {{{word}}}, which rows of {kind} cannot fill: use {{instruction}}"):
        RowFormat(kind, fields, template)


def test_turns_after_the_last_answer_are_left_out(tokenizer):
    row, longer = ({"messages": [*MESSAGES, *more]} for more in ([], [{"role": "user", "content": "thanks"}] * 2))
    found = RowFormat.detect(longer)
    assert found.segments(longer, tokenizer) == found.segments(row, tokenizer)
    assert found.question_and_answer(longer, tokenizer) == found.question_and_answer(row, tokenizer)


def test_a_completion_without_an_answer_is_refused():
    with pytest.raises(InputError, match="no message is the assistant's, to be learned"):
        RowFormat.detect({"prompt": MESSAGES, "completion": [{"role": "user", "content": "x"}]})


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}])
@pytest.mark.parametrize(("turn", "learned"), [(2, "four<|im_end|>"), (4, "two<|im_end|>")])
def test_an_answer_that_is_marked_is_not_learned(tokenizer, mark, turn, learned):
    messages = [message | (mark if n == turn else {"weight": None}) for n, message in enumerate(MESSAGES)]
    turns = [
        {"from": m["role"], "value": m["content"]} | {k: v for k, v in m.items() if k in ("weight", "train")} for m in messages
    ]
    for row in ({"messages": messages}, {"conversations": turns}):
        found = RowFormat.detect(row)
        segments = found.segments(row, tokenizer)
        assert [segment.text for segment in segments if segment.supervised] == [learned]
        assert tokenizer.apply_chat_template(MESSAGES, tokenize=False).startswith("".join(s.text for s in segments))
        assert found.question_and_answer(row, tokenizer)[1] + "<|im_end|>" == learned
    with pytest.raises(InputError, match="weight may be 0 or 1"):
        RowFormat.detect({"messages": [m | {"weight": 0.5} for m in MESSAGES]})


def test_sharegpts_system_field_comes_first(tokenizer):
    turns = [{"from": role, "value": content} for role, content in TURNS]
    one, other = {"conversations": turns}, {"system": "be brief", "conversations": turns[1:]}
    found = RowFormat.detect(one)
    assert found.segments(one, tokenizer) == found.segments(other, tokenizer)
    with pytest.raises(InputError, match="begins with a system message, and the row has a system field"):
        found.check(one | other | {"conversations": turns}, 1)
    with pytest.raises(InputError, match="system field 3 is not text"):
        found.check(other | {"system": 3}, 1)
