import pytest
import torch
from conftest import llama

from bonetune.errors import InputError
from bonetune.models import cut, generate, generate_batches

PROMPTS = ["the quick brown fox", "a", "what is one plus two? three", "the lazy dog jumps over", "system", "user user"]


@pytest.fixture
def chatty(tokenizer):
    """A model that does not end by itself."""
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] = 0
    return model


def test_an_answer_ends_before_the_first_stop_text(chatty, tokenizer):
    whole = generate(chatty, tokenizer, PROMPTS, max_new_tokens=20)
    # two characters that every answer may hold, across tokens too
    stop = sorted({text[4:6] for text in whole if len(text) > 6})
    assert generate(chatty, tokenizer, PROMPTS, max_new_tokens=20, stop=stop) == [cut(text, stop) for text in whole]


def test_generation_ends_once_every_answer_has(chatty, tokenizer):
    whole = generate(chatty, tokenizer, ["a"], max_new_tokens=20)[0]
    calls = []
    chatty.register_forward_pre_hook(lambda *_: calls.append(1))
    generate(chatty, tokenizer, ["a"], max_new_tokens=20, stop=[whole[:2]])
    assert len(calls) < 20


def test_cut():
    assert cut("one two three", ["three", "tw"]) == "one "
    assert cut("one", []) == cut("one", ["two"]) == "one"


def test_what_is_done_is_left_out_and_the_rest_stays_the_same(chatty, tokenizer):
    settings = {"max_new_tokens": 8, "batch_size": 2}
    batches = list(generate_batches(chatty, tokenizer, PROMPTS, **settings))
    assert sorted(number for batch in batches for number in batch) == list(range(len(PROMPTS)))
    assert list(generate_batches(chatty, tokenizer, PROMPTS, done=list(batches[0]), **settings)) == batches[1:]
    # half of a batch that is done is made again, with the other half
    assert (
        list(generate_batches(chatty, tokenizer, PROMPTS, done=[*batches[0], next(iter(batches[1]))], **settings))
        == batches[1:]
    )


def test_whether_an_answer_came_to_its_end_is_told(chatty, tokenizer):
    whole = generate(chatty, tokenizer, PROMPTS, max_new_tokens=20)
    (batch,) = generate_batches(chatty, tokenizer, PROMPTS, max_new_tokens=20)
    assert not any(answer.complete for answer in batch.values())
    (batch,) = generate_batches(chatty, tokenizer, PROMPTS, max_new_tokens=20, stop=[whole[0][3:5]])
    assert batch[0].complete
    ending, ids = llama(), tokenizer("a", return_tensors="pt").input_ids
    with torch.no_grad():
        ending.lm_head.weight[tokenizer.eos_token_id] = 100 * ending.model(ids)[0][0, -1]
    (batch,) = generate_batches(ending, tokenizer, ["a"], max_new_tokens=20)
    assert batch[0] == ("", True)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_no_answer_is_shortened_by_anothers_prompt(chatty, tokenizer, batch_size):
    prompts = ["a " * 55, "a", "b " * 40, "c " * 40]
    alone = [generate(chatty, tokenizer, [prompt], max_new_tokens=120)[0] for prompt in prompts]
    assert generate(chatty, tokenizer, prompts, max_new_tokens=120, batch_size=batch_size) == alone


def test_a_model_writes_no_further_than_it_can_count(chatty, tokenizer):
    prompt = "a " * 60
    room = chatty.config.max_position_embeddings - len(tokenizer(prompt).input_ids)
    (answer,) = generate(chatty, tokenizer, [prompt], max_new_tokens=10_000)
    assert len(tokenizer(answer, add_special_tokens=False).input_ids) <= room
    with pytest.raises(InputError, match=r"Prompt 2 has \d+ tokens, and the model takes 128 with its answer \(1 of 2 prompts"):
        generate(chatty, tokenizer, ["a", "a " * 400], max_new_tokens=4)
