import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from bonetune.data import RowFormat, prompt_tokens
from bonetune.data.examples import IGNORED
from bonetune.data.tokens import causal_examples
from bonetune.errors import InputError

FORMAT = RowFormat("messages", ("messages",))
GIVEN = RowFormat("tokens", ("input_ids",))
TURNS = [("user", "the quick"), ("assistant", "brown fox"), ("user", "jumps"), ("assistant", "over the lazy dog")]
ROW = {"messages": [{"role": role, "content": content} for role, content in TURNS]}
# Turns without tokens of their own, in which words of different people meet in one token.
PLAIN = (
    "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def supervised(example, tokenizer):
    runs, current = [], []
    for label in [*example.labels, IGNORED]:
        if label != IGNORED:
            current.append(label)
        elif current:
            runs.append(tokenizer.decode(current))
            current = []
    return runs


def test_turns_with_tokens_of_their_own_are_tokenized_alike_apart_and_together(tokenizer):
    (example,) = causal_examples([(1, ROW)], FORMAT, tokenizer)
    rendered = tokenizer.apply_chat_template(ROW["messages"], tokenize=False).removesuffix("\n")
    assert example.input_ids == tokenizer(rendered).input_ids
    assert supervised(example, tokenizer) == ["brown fox<|im_end|>", "over the lazy dog<|im_end|>"]


@pytest.fixture
def merging(tokenizer):
    """A tokenizer that makes tokens across what two people say, and a template that lets it."""
    tokenizer.add_tokens(["fox user"])
    tokenizer.chat_template = PLAIN
    return tokenizer


def test_what_went_before_the_last_answer_has_the_tokens_that_the_model_will_see(merging):
    (example,) = causal_examples([(1, ROW)], FORMAT, merging)
    prompt = merging.apply_chat_template(ROW["messages"][:-1], tokenize=False, add_generation_prompt=True)
    seen = merging(prompt).input_ids
    assert example.input_ids[: len(seen)] == seen
    assert merging.convert_tokens_to_ids("fox user") in seen
    assert example.input_ids[len(seen) :] == example.labels[len(seen) :]
    assert merging.decode(example.labels[len(seen) :]).startswith("over the lazy dog")


def test_a_token_that_is_not_the_assistants_alone_is_not_supervised(merging):
    (example,) = causal_examples([(1, ROW)], FORMAT, merging)
    assert merging.convert_tokens_to_ids("fox user") not in example.labels
    first, last = supervised(example, merging)
    assert first.strip() == "brown"
    assert last == "over the lazy dog <|im_end|>"


def test_one_turn_is_the_prompt_and_the_answer(merging):
    row = {"messages": ROW["messages"][:2]}
    (example,) = causal_examples([(1, row)], FORMAT, merging)
    prompt = merging.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True)
    seen = merging(prompt).input_ids
    assert example.input_ids[: len(seen)] == seen
    assert example.labels == [IGNORED] * len(seen) + example.input_ids[len(seen) :]


def test_without_offsets_it_is_refused(merging):
    class Slow:
        is_fast = False

        def __call__(self, *arguments, **settings):
            return merging(*arguments, **settings)

        def __getattr__(self, name):
            return getattr(merging, name)

    with pytest.raises(InputError, match="Row 7: tokenized as one text, this conversation has other tokens than turn by turn"):
        causal_examples([(7, ROW)], FORMAT, Slow())


def test_with_prompts_learned_too_everything_is_supervised(merging):
    (example,) = causal_examples([(1, ROW)], FORMAT, merging, completion_only_loss=False)
    assert example.labels == [IGNORED, *example.input_ids[1:]]


def test_a_chat_template_opens_a_text_itself(tokenizer):
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    (example,) = causal_examples([(1, ROW)], FORMAT, tokenizer)
    assert example.input_ids.count(tokenizer.bos_token_id) == 1
    assert prompt_tokens(tokenizer, "a") == prompt_tokens(tokenizer, "<bos>a") == tokenizer("a").input_ids


def test_a_row_that_cannot_be_rendered_is_named(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(InputError, match="Row 5: The tokenizer's chat template refuses"):
        causal_examples([(5, ROW)], FORMAT, tokenizer)


def test_an_empty_prompt_needs_an_opening_token(tokenizer):
    with pytest.raises(InputError, match="An empty prompt"):
        prompt_tokens(tokenizer, "")


def test_given_ids_are_those_of_the_text_they_came_from(tokenizer):
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    for completion_only_loss in (True, False):
        text = causal_examples([(7, {"text": "the lazy dog"})], RowFormat("text", ("text",)), tokenizer, completion_only_loss)
        ids = text[0].input_ids
        for given in (ids, tuple(ids), np.asarray(ids, np.uint16), [np.int64(token) for token in ids]):
            made = causal_examples([(7, {"input_ids": given})], GIVEN, tokenizer, completion_only_loss)
            assert made == text
            assert {type(token) for token in made[0].input_ids + made[0].labels} == {int}


def test_given_ids_get_no_beginning_and_no_end(tokenizer):
    (example,) = causal_examples([(1, {"input_ids": [5, 6, 7]})], GIVEN, tokenizer)
    assert (example.input_ids, example.labels, example.supervised) == ([5, 6, 7], [IGNORED, 6, 7], 2)


@pytest.mark.parametrize(
    ("ids", "wrong"),
    [
        ([5, 320], "320"),
        ([5, -1], "-1"),
        ([5, 10**30], "1000000"),
        ([5, 6.0], "6.0"),
        ([5, "6"], "'6'"),
        ([5, None], "None"),
        ([5, True], "True"),
        ([5, [6]], r"\[6\]"),
        (np.asarray([5, 320], np.uint16), "320"),
        (np.asarray([5, -3]), "-3"),
    ],
)
def test_ids_of_another_vocabulary_are_named(tokenizer, ids, wrong):
    with pytest.raises(InputError, match=rf"^Row 4: {wrong}.* is no id of this tokenizer's vocabulary, which has 320 tokens"):
        causal_examples([(3, {"input_ids": [5, 319]}), (4, {"input_ids": ids})], GIVEN, tokenizer)
