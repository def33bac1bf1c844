"""RWKV's tokenizer against the official package's, and as transformers and training use it."""

import copy
import importlib.util
import pickle
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, TextIteratorStreamer

from bonetune.data import RowFormat, encode_rows
from bonetune.errors import InputError
from bonetune.models import load_tokenizer
from bonetune.rwkv import WorldTokenizer
from bonetune.rwkv.tokenizer import END_OF_TEXT

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]


@pytest.fixture(scope="module")
def tokenizer():
    return WorldTokenizer()


@pytest.fixture(scope="module")
def official():
    folder = Path(importlib.util.find_spec("rwkv").origin).parent
    spec = importlib.util.spec_from_file_location("official_tokenizer", folder / "rwkv_tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TRIE_TOKENIZER(str(folder / "rwkv_vocab_v20230424.txt"))


TEXTS = st.one_of(
    st.text(max_size=60),
    st.lists(
        st.sampled_from([*"\n\t\r 中文字😀éß§", "\n\n", "User:", " the", "Assistant", "\x00", "\x17", "  "]), max_size=40
    ).map("".join),
)


@given(text=TEXTS)
@settings(max_examples=300, deadline=None)
def test_ids_are_the_official_ones_and_lead_back_to_the_text(tokenizer, official, text):
    text = text.encode("utf-8", "ignore").decode()  # no lone surrogates, which are no text
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids == official.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(ids)) == ids


def test_the_end_of_a_text_is_id_0_and_nothing_opens_one(tokenizer, official):
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token) == (0, 0, None)
    assert tokenizer(f"Hi there{END_OF_TEXT}").input_ids == [*official.encode("Hi there"), 0]
    assert tokenizer.decode([*official.encode("Hi"), 0], skip_special_tokens=True) == "Hi"
    assert (len(tokenizer), tokenizer.vocab_size) == (65530, 65530)
    assert tokenizer.decode([*official.encode("Hi"), 65535]) == "Hi"  # a row of the model that is no token


def test_batches_are_padded(tokenizer):
    batch = tokenizer(["one two three", "one"], padding=True, return_tensors="pt")
    assert batch.attention_mask.tolist()[1] == [1] + [0] * (batch.input_ids.shape[1] - 1)
    assert batch.input_ids[1, 1:].tolist() == [0] * (batch.input_ids.shape[1] - 1)
    assert tokenizer.batch_decode(batch.input_ids, skip_special_tokens=True) == ["one two three", "one"]


def test_half_a_character_is_replaced_and_a_streamer_waits_for_the_rest(tokenizer):
    ids = tokenizer("a𓀀b").input_ids  # of single bytes
    assert len(ids) > 4
    assert tokenizer.decode(ids[:2]) == "a�"
    streamer = TextIteratorStreamer(tokenizer)
    for number in ids:
        streamer.put(torch.tensor([number]))
    streamer.end()
    assert "".join(streamer) == "a𓀀b"


@pytest.mark.parametrize(("end", "number"), [("\x17", 24), ("\n\n", 261)])
def test_another_token_may_end_texts(tmp_path, end, number):
    WorldTokenizer().save_pretrained(tmp_path / "own")
    changed = load_tokenizer(str(tmp_path / "own"), eos_token=end)
    assert (changed.eos_token_id, changed.pad_token_id, len(changed)) == (number, 0, 65530)
    assert changed("Hi." + end).input_ids[-1] == number
    changed.save_pretrained(tmp_path / "changed")
    again = load_tokenizer(str(tmp_path / "changed"))
    assert (again.eos_token_id, again.pad_token_id) == (number, 0)
    examples, _ = encode_rows(
        [{"prompt": "Q:", "completion": " A."}], RowFormat.detect({"prompt": "", "completion": ""}), again, 99
    )
    assert examples[0].input_ids[-1] == examples[0].labels[-1] == number


@pytest.mark.parametrize(("end", "number"), [("\x17", 24), ("\n\n", 261)])
def test_an_end_that_is_merely_set_is_one_token_at_once_and_after_saving(tmp_path, official, end, number):
    changed = WorldTokenizer()
    changed.eos_token = end
    changed.save_pretrained(tmp_path)
    for each in (changed, copy.deepcopy(changed), AutoTokenizer.from_pretrained(tmp_path)):
        assert (each.eos_token_id, each.pad_token_id, len(each)) == (number, 0, 65530)
        assert each("Line\n" + end).input_ids == [*official.encode("Line\n"), number]
        assert each.decode(each("Hi." + end).input_ids, skip_special_tokens=True) == "Hi."
        talk = [{"role": ("user", "assistant")[n % 2], "content": word} for n, word in enumerate(["a", "b", "c", "d"])]
        examples, _ = encode_rows([{"messages": talk}], RowFormat("messages", ("messages",)), each, 99)
        learned = [label for label in examples[0].labels if label >= 0]
        assert each.decode(learned) == (" b\n\n d\n\n" if end == "\n\n" else " b\n\n d\n\n\x17")
        assert learned[-1] == number


def test_an_end_cuts_longer_tokens_that_hold_it(tokenizer, official):
    changed = WorldTokenizer()
    changed.eos_token = "\n\n"
    (whole,) = official.encode("\n\n\n")
    assert tokenizer("a\n\n\nb").input_ids == [*official.encode("a"), whole, *official.encode("b")]
    assert changed("a\n\n\nb").input_ids == [*official.encode("a"), 261, *official.encode("\nb")]
    assert changed("a\n\n\n").input_ids == [*official.encode("a\n"), 261]


def test_a_folder_stands_alone_and_copies_are_whole(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(again, WorldTokenizer)
    for other in (again, copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert other("héllo 世界\n\n").input_ids == tokenizer("héllo 世界\n\n").input_ids
        assert other.get_vocab() == tokenizer.get_vocab()


def test_conversations_are_rwkv_s_and_only_answers_are_learned(tokenizer):
    prompt = tokenizer.apply_chat_template(TALK[:4], tokenize=False, add_generation_prompt=True)
    assert prompt == "System: Be kind.\n\nUser: What is 2+2?\n\nAssistant: It is 4.\n\nUser: Sure?\n\nAssistant:"
    examples, _ = encode_rows([{"messages": TALK}], RowFormat("messages", ("messages",)), tokenizer, 99)
    learned = [label for label in examples[0].labels if label >= 0]
    assert tokenizer.decode(learned) == f" It is 4.\n\n Yes.\n\n{END_OF_TEXT}"
    assert tokenizer.decode(examples[0].input_ids) == f"{prompt} Yes.\n\n{END_OF_TEXT}"
    rows = [{"messages": [{"role": "tool", "content": "x"}, TALK[2]]}]
    with pytest.raises(InputError, match="only system, user and assistant"):
        encode_rows(rows, RowFormat("messages", ("messages",)), tokenizer, 99)


@given(words=st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=12), min_size=2, max_size=6))
@settings(max_examples=100, deadline=None)
def test_turns_have_the_tokens_that_they_have_in_the_whole_conversation(tokenizer, words):
    words = [word.strip() or "x" for word in words]
    talk = [{"role": ("user", "assistant")[n % 2], "content": word} for n, word in enumerate(words[: len(words) // 2 * 2])]
    examples, _ = encode_rows([{"messages": talk}], RowFormat("messages", ("messages",)), tokenizer, 9999)
    text = tokenizer.apply_chat_template(talk, tokenize=False)
    assert examples[0].input_ids == [*tokenizer(text).input_ids, 0]


def test_no_token_reaches_from_one_turn_into_another(official):
    # so that every conversation, not only those above, has the same tokens turn by turn; the pairs are the segments' seams
    seams = [(b"Assistant:", b" "), *((b"\n\n", role) for role in (b"System:", b"User:", b"Assistant:"))]
    for token in official.idx2token.values():
        for place in range(1, len(token)):
            left, right = token[:place], token[place:]
            for before, after in seams:
                met = (before.endswith(left) or left.endswith(before)) and (after.startswith(right) or right.startswith(after))
                assert not met, token


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["1 '\\x00' 1", "2 nonsense 1"], "line 2"),
        (["1 '\\x00' 2"], "line 1"),
        (["x 'a' 1"], "line 1"),
        (["1 __import__('os') 1"], "line 1"),
        (["1 'a' 1", "1 'b' 1"], "line 2"),
        (["1 'a' 1", "2 'a' 1"], "line 2"),  # the same token twice
        (["1 'a' 1", "3 'b' 1"], "line 2: .* is not id 2"),  # a line is missing
        (["1 '' 0"], "line 1"),
        ([f"{n} {f'{n:06}'!r} 6" for n in range(1, 65537)], "line 65536: more than 65535 tokens"),
        (["1 'a' 1"], "no token for 255 of the 256 bytes"),
        ([], "no token for 256"),
    ],
)
def test_a_vocabulary_that_is_none_is_one_line(tmp_path, lines, message):
    (tmp_path / "vocabulary.txt").write_text("".join(line + "\n" for line in lines))
    with pytest.raises(InputError, match=message):
        WorldTokenizer(str(tmp_path / "vocabulary.txt"))
    with pytest.raises(InputError, match="cannot be read"):
        WorldTokenizer(str(tmp_path / "missing.txt"))


def test_a_vocabulary_of_one_s_own(tmp_path):
    lines = [f"{number + 1} {bytes([number])!r} 1" for number in range(256)] + ["257 'ab' 2"]
    (tmp_path / "vocabulary.txt").write_text("\n".join(lines))
    own = WorldTokenizer(str(tmp_path / "vocabulary.txt"))
    assert own("abc").input_ids == [257, ord("c") + 1]
    own.save_pretrained(tmp_path / "folder")
    (tmp_path / "vocabulary.txt").unlink()
    assert AutoTokenizer.from_pretrained(tmp_path / "folder")("abc").input_ids == [257, ord("c") + 1]


def test_without_the_package_there_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyrwkv_tokenizer", None)
    with pytest.raises(InputError, match=r"pip install 'bonetune\[rwkv\]'"):
        WorldTokenizer()
