import pytest
import torch
from conftest import llama
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from bonetune.errors import InputError
from bonetune.models import cut, generate, generate_batches
from bonetune.models.generation import continuation

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


@pytest.fixture
def sentencepiece():
    """A tokenizer with LlamaTokenizer's normalizer and decoder, which takes a space off the beginning of what it decodes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "\u2581\u2581"]
    pieces += ["\u2581\u2581\u2581\u2581", "\u2581return", "\u2581x", "return", "x", "\u00e9", "def", "\u2581def", ":"]
    vocabulary = [(piece, -float(len(pieces) - len(piece))) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("text", ["    return x", " x", "x", "\n    return x", "\u00e9x", " \u2705", ""])
@pytest.mark.parametrize("before", ["def x:\n", "def", "def    ", "def \u2705", "x\u00e9", " "])
def test_a_continuation_begins_with_the_white_space_it_was_given(sentencepiece, tokenizer, before, text):
    for one in (sentencepiece, tokenizer):
        head = one(before, add_special_tokens=False).input_ids
        alone = one(f"x{text}", add_special_tokens=False).input_ids
        tokens = alone[len(one("x", add_special_tokens=False).input_ids) :]
        assert one.decode([*head, *tokens]) == one.decode(head) + text  # what follows begins a token
        assert continuation(one, [one.bos_token_id, *head], [*tokens, one.eos_token_id]) == text


def test_a_torn_character_does_not_take_the_prompt_into_the_answer(sentencepiece, tokenizer):
    torn = sentencepiece.convert_tokens_to_ids("<0xE2>")
    assert continuation(sentencepiece, sentencepiece("def\n").input_ids, [torn]) == "\ufffd"
    assert continuation(tokenizer, tokenizer("def").input_ids, tokenizer("\u2705").input_ids[:1]) == "\ufffd"


def test_a_body_keeps_its_indentation(sentencepiece):
    """A model that writes one line, whatever it is asked."""
    line = sentencepiece.convert_tokens_to_ids(["\u2581\u2581", "\u2581\u2581", "return", "\u2581x", "</s>"])
    model = llama(vocab_size=len(sentencepiece), eos_token_id=2, pad_token_id=2)

    def scripted(module, inputs, output):
        place = generated[0]
        generated[0] += 1
        return torch.nn.functional.one_hot(torch.tensor(line[place]), len(sentencepiece)).expand_as(output) * 9.0

    generated = [0]
    model.lm_head.register_forward_hook(scripted)
    assert generate(model, sentencepiece, ["def x:\n"], max_new_tokens=9) == ["    return x"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_told_of(tokenizer, value):
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[7] = value
    with pytest.warns(UserWarning, match="logits are not finite"):
        generate(model, tokenizer, ["a"], max_new_tokens=2)
