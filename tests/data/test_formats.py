import pytest

from bonetune.data import PAPER_PROMPT, RowFormat, Segment
from bonetune.errors import InputError


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


def test_messages_supervise_every_word_of_the_assistant_and_no_other(tokenizer):
    roles = ["system", "user", "assistant", "user", "assistant"]
    row = {"messages": [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(roles)]}
    found = RowFormat.detect(row)
    segments = found.segments(row, tokenizer)
    assert [s.text for s in segments if s.supervised] == ["assistant 2<|im_end|>", "assistant 4<|im_end|>"]
    rendered = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    assert "".join(s.text for s in segments) == rendered.removesuffix("\n")
    question, answer = found.question_and_answer(row, tokenizer)
    assert question == tokenizer.apply_chat_template(row["messages"][:-1], tokenize=False, add_generation_prompt=True)
    assert answer == "assistant 4"


@pytest.mark.parametrize(
    ("row", "fields", "message"),
    [
        ({"text": "x"}, None, "Rows with the fields text fit no known format"),
        ({"a": "x"}, ["a", "b"], "Row 1 has no field 'b': its fields are a"),
        ({"prompt": 1, "completion": "x"}, None, "Row 1, field 'prompt': 1 is not text"),
        ({"messages": "hello"}, None, "not a list of objects"),
        ({"messages": []}, None, "not a list of objects"),
        ({"messages": [{"role": "user", "content": "x"}]}, None, "the last message is not the assistant's"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, None, "the first message is the assistant's"),
        ({"a": "x"}, ["a"], "dataset_field names two fields"),
    ],
)
def test_rows_that_do_not_fit(row, fields, message):
    with pytest.raises(InputError, match=message):
        RowFormat.detect(row, fields)


def test_messages_need_a_chat_template(tokenizer):
    tokenizer.chat_template = None
    row = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
    with pytest.raises(InputError, match="need a tokenizer with a chat template"):
        RowFormat.detect(row).segments(row, tokenizer)


def test_a_template_that_rewrites_the_past_is_refused(tokenizer):
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    row = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
    with pytest.raises(InputError, match="cannot be told from the rest"):
        RowFormat.detect(row).segments(row, tokenizer)


def test_a_prompt_template_without_a_place_for_the_instruction_is_refused():
    with pytest.raises(InputError, match=r"lacks \{instruction\}"):
        RowFormat.detect({"a": "x", "b": "y"}, ["a", "b"], "Hello")


def test_a_template_without_an_end_of_text_still_teaches_the_end(tokenizer):
    turns = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}assistant: {% endif %}"
    row = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
    assert RowFormat.detect(row).segments(row, tokenizer)[-1] == Segment("y\n<|im_end|>", True)


def test_a_template_that_refuses_a_role_says_so(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    row = {"messages": [{"role": "system", "content": "x"}, {"role": "assistant", "content": "y"}]}
    with pytest.raises(InputError, match="refuses a conversation of system: System role not supported"):
        RowFormat.detect(row).segments(row, tokenizer)


def test_an_answer_that_ends_itself_ends_once(tokenizer):
    row = {"prompt": "1+1=", "completion": " 2<|im_end|>"}
    assert RowFormat.detect(row).segments(row, tokenizer)[-1].text == " 2<|im_end|>"
