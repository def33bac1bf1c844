"""Tokenizers in GGUF files: read by transformers' own reader, and merged as llama.cpp merges."""

import json
import re
from itertools import pairwise

import pytest
from formats.gguf_models import field, folder_of
from formats.gguf_tokenizers import BYTE_LEVEL, SIZE, TEXTS, byte_level, finished, sentencepiece, split
from gguf import TokenType
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from bonetune.errors import InputError
from bonetune.formats.gguf_model import write_gguf
from bonetune.formats.gguf_vocabulary import vocabulary


def written(tmp_path, tokenizer, **options):
    folder = folder_of(tmp_path / "model", "llama", tokenizer, vocab_size=SIZE)
    return write_gguf(str(folder), str(tmp_path / "model.gguf"), **options)


def of(tokenizer, pre_tokenizer=None, size=SIZE):
    return vocabulary(tokenizer, size, [tokenizer.eos_token_id], pre_tokenizer)


def changed(tokenizer, **changes):
    """The tokenizer, parts of its JSON replaced."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    for key, value in changes.items():
        place = content["model"] if key in content["model"] else content
        place[key] = value
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))
    return tokenizer


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_how_texts_are_cut_is_recognised(name):
    found = of(byte_level(name))
    assert found.pre_tokenizer == name
    assert bool(found.notes) == (name in ("qwen2", "tekken"))


def test_transformers_reads_the_same_tokenizer(tmp_path):
    tokenizer = byte_level("gpt-2")  # the only way to cut that its reader knows
    assert written(tmp_path, tokenizer).pre_tokenizer == "gpt-2"
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in TEXTS:
        assert theirs(text, add_special_tokens=False).input_ids == tokenizer(text, add_special_tokens=False).input_ids
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_what_the_file_says(tmp_path):
    tokenizer = byte_level("llama-bpe", bos=True)
    tokenizer.chat_template = "{{ messages[0].content }}"
    written(tmp_path, tokenizer)
    file = tmp_path / "model.gguf"
    expected = {
        "model": "gpt2",
        "pre": "llama-bpe",
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "add_bos_token": True,
        "add_eos_token": False,
    }
    assert {key: field(file, f"tokenizer.ggml.{key}") for key in expected} == expected
    assert field(file, "tokenizer.chat_template") == tokenizer.chat_template
    tokens, types = field(file, "tokenizer.ggml.tokens"), field(file, "tokenizer.ggml.token_type")
    assert len(tokens) == len(types) == SIZE
    assert len(set(tokens)) == SIZE
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    kinds = dict(zip(tokens, types, strict=True))
    assert kinds["<|im_start|>"] == TokenType.CONTROL
    assert kinds["<tool>"] == TokenType.USER_DEFINED
    assert kinds["a"] == TokenType.NORMAL
    assert kinds[f"[PAD{SIZE - 1}]"] == TokenType.UNUSED


def test_more_tokens_that_end_an_answer():
    tokenizer = byte_level("gpt-2")
    found = vocabulary(tokenizer, SIZE, [tokenizer.eos_token_id, 5, 6, 7])
    assert (found.special["eot"], found.special["eom"]) == (5, 6)
    assert found.notes == ("of the tokens that end an answer, GGUF has no place for 7",)
    tokenizer.eos_token = None
    assert vocabulary(tokenizer, SIZE, [5]).special["eos"] == 5
    with pytest.raises(InputError, match="names a token that ends an answer"):
        vocabulary(tokenizer, SIZE, [])


def test_ways_to_cut_that_are_not_known_are_refused_and_can_be_named():
    tokenizer = changed(byte_level("gpt-2"))
    tokenizer._tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split(r"\w\W"), pre_tokenizers.ByteLevel(False)])
    with pytest.raises(InputError, match=r"not known here: \\w\\W then .*Pass it as `pre_tokenizer`"):
        of(tokenizer)
    assert of(tokenizer, "chameleon").pre_tokenizer == "chameleon"
    tokenizer._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(False)]
    )
    with pytest.raises(InputError, match="Punctuation"):
        of(tokenizer)


def test_the_name_may_differ_where_whole_tokens_make_no_difference():
    """qwen2 has no name for tokenizers that keep pieces whole; where merges make every token, none is needed."""
    assert of(changed(byte_level("qwen2"), ignore_merges=True)).pre_tokenizer == "qwen2"
    unreachable = changed(byte_level("qwen2"), ignore_merges=True)
    content = json.loads(unreachable.backend_tokenizer.to_str())
    del content["model"]["merges"][-1]
    unreachable._tokenizer = Tokenizer.from_str(json.dumps(content))
    with pytest.raises(InputError, match="not known here"):
        of(unreachable)


def test_texts_that_are_normalized():
    assert of(byte_level("qwen2")).notes == ("llama.cpp does not compose Unicode characters (NFC); this tokenizer does",)
    tokenizer = byte_level("gpt-2")
    tokenizer._tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(InputError, match=r"does not normalize texts .*: Lowercase"):
        of(tokenizer)


def test_other_kinds_of_tokenizers_are_refused():
    with pytest.raises(InputError, match="type WordPiece cannot"):
        of(finished(Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))))
    plain = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(InputError, match="neither byte-level BPE nor"):
        of(finished(plain))


def test_tokens_around_a_text_that_have_no_name_are_refused():
    tokenizer = byte_level("gpt-2")
    number = tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", number)]
    )
    with pytest.raises(InputError, match=rf"makes \[{number}, \d+\] of a text whose tokens are \[\d+\]"):
        of(tokenizer)


def test_tokens_beyond_the_embedding_are_refused():
    with pytest.raises(InputError, match="embedding has 300 rows only"):
        of(byte_level("gpt-2"), size=300)


def test_tokens_that_take_spaces_are_mentioned():
    tokenizer = byte_level("gpt-2")
    tokenizer.add_tokens([AddedToken("<x>", rstrip=True, normalized=False)])
    assert of(tokenizer).notes == ("the token <x> takes spaces beside it or stands alone; in llama.cpp it does not",)


def merged_by_scores(found, text):
    """Tokens of a text without special tokens as llama.cpp finds them: again and again, the best pair of neighbours."""
    ids = {token: number for number, token in enumerate(found.tokens)}
    pieces = list(((" " if found.add["space_prefix"] else "") + text).replace(" ", "\u2581"))
    while True:
        pairs = [
            (found.scores[ids[left + right]], -place)
            for place, (left, right) in enumerate(pairwise(pieces))
            if left + right in ids
        ]
        if not pairs:
            break
        place = -max(pairs)[1]
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
    numbers = []
    for piece in pieces:
        numbers += [ids[piece]] if piece in ids else [ids[f"<0x{byte:02X}>"] for byte in piece.encode()]
    return numbers


KINDS = [{"prefix": True}, {"prefix": False}, {"scheme": "first"}, {"scheme": "always"}, {"scheme": "never"}]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_merge_as_pairs_do(kind):
    tokenizer = sentencepiece(**kind)
    found = of(tokenizer)
    assert (found.kind, found.pre_tokenizer) == ("llama", "default")
    assert found.add == {"bos": True, "eos": False, "space_prefix": kind.get("prefix", True) and kind.get("scheme") != "never"}
    noted = kind.get("scheme") in ("first", "always")
    assert [note for note in found.notes if "begins with one" in note] == list(found.notes)
    assert bool(found.notes) == noted
    for text in TEXTS:
        if text and not re.search(r"<\|?\w+\|?>", text) and not (noted and text.startswith(" ")):
            assert merged_by_scores(found, text) == tokenizer(text, add_special_tokens=False).input_ids, text


def test_transformers_reads_the_same_sentencepiece(tmp_path):
    tokenizer = sentencepiece()
    written(tmp_path, tokenizer)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    padding = {f"[PAD{number}]": number for number in range(len(tokenizer), SIZE)}
    assert theirs.get_vocab().items() >= (tokenizer.get_vocab() | padding).items()
    for text in TEXTS:
        if not text.startswith((" ", "<|")):
            assert theirs(text, add_special_tokens=False).input_ids == tokenizer(text, add_special_tokens=False).input_ids
    kinds = field(tmp_path / "model.gguf", "tokenizer.ggml.token_type")
    assert kinds[0] == TokenType.UNKNOWN
    assert kinds[1:257] == [TokenType.BYTE] * 256


def test_merges_that_scores_cannot_say_are_refused():
    content = json.loads(sentencepiece().backend_tokenizer.to_str())["model"]["merges"]
    with pytest.raises(InputError, match=r"not SentencePiece's: .* do not become"):
        of(changed(sentencepiece(), merges=content[1:]))
    twice = next(i for i, (a, b) in enumerate(content[:-1]) if "".join(content[i + 1]) == a + b)
    apart = [*content[: twice + 1], *content[twice + 2 :], content[twice + 1]]
    with pytest.raises(InputError, match="are not together"):
        of(changed(sentencepiece(), merges=apart))


def test_a_name_of_how_to_cut_is_for_byte_level_tokenizers():
    with pytest.raises(InputError, match="`pre_tokenizer` 'gpt-2' is for byte-level"):
        of(sentencepiece(), "gpt-2")


def test_bytes_without_tokens_are_refused():
    tokenizer = Tokenizer(models.BPE(vocab={"<unk>": 0, "a": 1}, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Metaspace()
    with pytest.raises(InputError, match="lacks tokens for 256 of the 256 bytes, <0x00> for one"):
        of(finished(tokenizer))
