import pytest
from tokenizers.processors import TemplateProcessing

from bonetune.data import RowFormat, prompt_tokens
from bonetune.data.examples import IGNORED
from bonetune.data.tokens import causal_examples
from bonetune.errors import InputError

FORMAT = RowFormat("messages", ("messages",))
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
