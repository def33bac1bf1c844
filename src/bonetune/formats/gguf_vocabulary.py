"""A tokenizer as GGUF holds it: tokens, their types, merges or scores, and the name of a way to cut texts before merging."""

import json
from dataclasses import dataclass, field
from typing import Any

from bonetune.errors import InputError

# How texts are cut before merging, as regular expressions one after the other.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's names: where a piece that is a token stays whole, and where merges alone make tokens.
_NAMES: dict[tuple[str, ...], tuple[str | None, str | None]] = {
    (_GPT2,): (None, "gpt-2"),
    (r"\p{N}", _GPT2): (None, "smollm"),
    (_LLAMA3,): ("llama-bpe", "smaug-bpe"),
    (_QWEN2,): (None, "qwen2"),
    (_TEKKEN,): ("tekken", None),
}
_INEXACT = {"tekken": "llama.cpp cuts words with letters beyond a-z otherwise where their case changes"}
_SPACE = "\u2581"
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_SPECIAL = ("bos", "eos", "unk", "pad")


@dataclass(frozen=True)
class Vocabulary:
    """What GGUF says of a tokenizer.

    Args:
        kind: `gpt2`, merges of bytes, or `llama`, merges of characters as SentencePiece has them.
        pre_tokenizer: llama.cpp's name of how texts are cut before merging.
        tokens: their texts, by id; ids without a token have a name that no text has.
        types: `gguf.TokenType` of each.
        merges: of `gpt2`, most important first.
        scores: of `llama`; the pair whose joint token scores highest is merged first.
        special: ids of tokens by their part: bos, eos, unk, pad, and further ends of an answer: eot, eom.
        add: what is put before (bos) or after (eos) each text, and whether a space is put before it (space_prefix).
        chat_template: in Jinja.
        notes: in what llama.cpp will cut texts differently.
    """

    kind: str
    pre_tokenizer: str
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    special: dict[str, int] = field(default_factory=dict)
    add: dict[str, bool] = field(default_factory=dict)
    chat_template: str | None = None
    notes: tuple[str, ...] = ()


def vocabulary(tokenizer: Any, size: int, ends: list[int], pre_tokenizer: str | None = None) -> Vocabulary:
    """What GGUF says of a tokenizer.

    Args:
        tokenizer: one of transformers, with a `tokenizers` backend.
        size: rows of the model's embedding.
        ends: ids of all tokens that end an answer.
        pre_tokenizer: llama.cpp's name of how byte-level tokenizers cut texts; None: it is recognised.

    Raises:
        InputError: a tokenizer that GGUF or llama.cpp has no form for, or that is not recognised.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(f"A {type(tokenizer).__name__} cannot be written to GGUF: it has no `tokenizers` backend.")
    content = json.loads(backend.to_str())
    model, notes = content["model"], []
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise InputError(f"A tokenizer of type {model['type']} cannot be written to GGUF: it should be BPE, without affixes.")
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    steps, prefix = _steps(content), _space_prefix(content)
    if steps is not None:
        kind, merges, scores = "gpt2", [" ".join(pair) for pair in pairs], []
        name = pre_tokenizer or _recognised(steps, backend, model)
        notes += [_INEXACT[name]] if name in _INEXACT else []
        notes += _normalized(content["normalizer"])
    elif prefix is not None:
        if pre_tokenizer not in (None, "default"):
            raise InputError(
                f"`pre_tokenizer` {pre_tokenizer!r} is for byte-level tokenizers; this one is of SentencePiece's kind."
            )
        kind, name, merges = "llama", "default", []
        scores = _scores(model["vocab"], pairs, {token["content"] for token in content["added_tokens"]}, size)
        notes += _spaces_of_llama_cpp_alone(content)
    else:
        raise InputError(
            "This tokenizer is neither byte-level BPE nor of SentencePiece's kind with bytes for unknown characters: "
            f"pre_tokenizer {content['pre_tokenizer']}, normalizer {content['normalizer']}."
        )
    tokens, types = _tokens(tokenizer, model["vocab"], size, kind)
    for token in tokenizer.added_tokens_decoder.values():
        if token.lstrip or token.rstrip or token.single_word:
            notes.append(f"the token {token.content} takes spaces beside it or stands alone; in llama.cpp it does not")
    special = _special(tokenizer, ends, notes)
    add = _added(tokenizer) | ({} if prefix is None or kind == "gpt2" else {"space_prefix": prefix})
    return Vocabulary(kind, name, tokens, types, merges, scores, special, add, _chat_template(tokenizer), tuple(notes))


def add(writer: Any, vocabulary: Vocabulary) -> None:
    """Add a vocabulary to a GGUF writer."""
    writer.add_tokenizer_model(vocabulary.kind)
    writer.add_tokenizer_pre(vocabulary.pre_tokenizer)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.kind == "gpt2":
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores(vocabulary.scores)
    for part, token in vocabulary.special.items():
        getattr(writer, f"add_{part}_token_id")(token)
    for part, value in vocabulary.add.items():
        getattr(writer, "add_add_space_prefix" if part == "space_prefix" else f"add_add_{part}_token")(value)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def _steps(content: dict[str, Any]) -> tuple[str, ...] | None:
    """The regular expressions by which a byte-level tokenizer cuts texts; None if it is not byte-level, or cuts otherwise."""
    stated = content["pre_tokenizer"] or {}
    stages = stated.get("pretokenizers", [stated])
    if content["model"].get("byte_fallback") or stages[-1].get("type") != "ByteLevel" or stages[-1].get("add_prefix_space"):
        return None
    steps = []
    for stage in stages:
        match stage:
            case {"type": "ByteLevel"}:
                steps += [_GPT2] if stage.get("use_regex", True) else []
            case {"type": "Digits", "individual_digits": True}:
                steps.append(r"\p{N}")
            case {"type": "Split", "pattern": {"Regex": pattern}} if (stage["behavior"], stage["invert"]) in _WHOLE:
                steps.append(pattern.replace("\r", r"\r").replace("\n", r"\n"))
            case _:
                return (json.dumps(stage),)
    return tuple(steps)


# Behaviours of `Split` that keep what the pattern matches, each match by itself.
_WHOLE = (("Isolated", False), ("Removed", True))


def _recognised(steps: tuple[str, ...], backend: Any, model: dict[str, Any]) -> str:
    whole, merged = _NAMES.get(steps, (None, None))
    exact, other = (whole, merged) if model.get("ignore_merges") else (merged, whole)
    name = exact or (other if _merges_make_every_token(backend, model) else None)
    if name is None:
        raise InputError(
            f"llama.cpp's name for how this tokenizer cuts texts is not known here: {' then '.join(steps) or 'not at all'}. "
            "Pass it as `pre_tokenizer` (llama.cpp's tokenizer.ggml.pre, such as gpt-2, llama-bpe or qwen2)."
        )
    return name


def _merges_make_every_token(backend: Any, model: dict[str, Any]) -> bool:
    """Whether it makes no difference that a piece that is a token stays whole."""
    from tokenizers import Tokenizer

    content = json.loads(backend.to_str())
    content["model"]["ignore_merges"] = False
    merging = Tokenizer.from_str(json.dumps(content)).model
    added = {token["content"] for token in content["added_tokens"]}
    return all([token.value for token in merging.tokenize(text)] == [text] for text in model["vocab"] if text not in added)


def _normalized(normalizer: dict[str, Any] | None) -> list[str]:
    if normalizer is None:
        return []
    kinds = [stage["type"] for stage in normalizer.get("normalizers", [normalizer])]
    if kinds not in ([], ["NFC"]):
        raise InputError(f"llama.cpp does not normalize texts for byte-level tokenizers; this one does: {', '.join(kinds)}.")
    return ["llama.cpp does not compose Unicode characters (NFC); this tokenizer does"] if kinds else []


def _space_prefix(content: dict[str, Any]) -> bool | None:
    """Whether a tokenizer of SentencePiece's kind puts a space before a text; None if it is of another kind."""
    if not content["model"].get("byte_fallback"):
        return None
    normalizer, stated = content["normalizer"], content["pre_tokenizer"]
    stages = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    prepend = {"type": "Prepend", "prepend": _SPACE}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    if stated is None and stages in ([prepend, replace], [replace]):
        return len(stages) == 2
    if not stages and stated is not None and stated.get("type") == "Metaspace":
        return None if stated.get("split", True) or stated["replacement"] != _SPACE else stated["prepend_scheme"] != "never"
    return None


def _spaces_of_llama_cpp_alone(content: dict[str, Any]) -> list[str]:
    places = {"always": "that begins with one", "first": "that begins with one, or follows a special token"}
    place = places.get(str((content["pre_tokenizer"] or {}).get("prepend_scheme")))
    return [] if place is None else [f"llama.cpp puts a space before a text {place}; this tokenizer does not"]


def _scores(vocab: dict[str, int], pairs: list[tuple[str, ...]], added: set[str], size: int) -> list[float]:
    """Scores under which llama.cpp merges in the order of the pairs: it knows no pairs, only tokens that two others make.

    Raises:
        InputError: there are no such scores.
    """
    ranks: dict[str, int] = {}
    last = None
    for rank, (left, right) in enumerate(pairs):
        joint = left + right
        if joint in ranks and joint != last:
            raise InputError(f"This tokenizer's merges are not SentencePiece's: those that make {joint!r} are not together.")
        ranks.setdefault(joint, rank)
        last = joint
    known = set(pairs)
    plain = set(vocab) - added - set(_BYTES)
    for joint in plain:
        cuts = [(joint[:cut], joint[cut:]) for cut in range(1, len(joint))]
        missing = [cut for cut in cuts if plain.issuperset(cut) and cut not in known]
        if missing:
            raise InputError(f"This tokenizer's merges are not SentencePiece's: {missing[0]} do not become {joint!r}.")
    scores = [-float(len(pairs))] * size
    for token, rank in ranks.items():
        scores[vocab[token]] = -float(rank)
    return scores


def _tokens(tokenizer: Any, vocab: dict[str, int], size: int, kind: str) -> tuple[list[str], list[int]]:
    from bonetune.formats.gguf_layout import import_gguf

    types = import_gguf().TokenType
    found = {number: (text, types.NORMAL) for text, number in vocab.items()}
    if kind == "llama":
        if missing := [byte for byte in _BYTES if byte not in vocab]:
            raise InputError(f"The tokenizer lacks tokens for {len(missing)} of the 256 bytes, {missing[0]} for one.")
        found |= {vocab[byte]: (byte, types.BYTE) for byte in _BYTES}
    for number, token in tokenizer.added_tokens_decoder.items():
        text = token.content if token.special or kind == "gpt2" else token.content.replace(_SPACE, " ")
        found[number] = (text, types.CONTROL if token.special else types.USER_DEFINED)
    if kind == "llama" and tokenizer.unk_token_id is not None:
        found[tokenizer.unk_token_id] = (tokenizer.unk_token, types.UNKNOWN)
    if max(found) >= size:
        raise InputError(f"The tokenizer has a token {max(found)}, and the model's embedding has {size} rows only.")
    content = [found.get(number, (f"[PAD{number}]", types.UNUSED)) for number in range(size)]
    texts = [text for text, _ in content]
    if len(set(texts)) < size:
        twice = next(text for text in texts if texts.count(text) > 1)
        raise InputError(f"The tokenizer has two tokens of the text {twice!r}; GGUF tells tokens apart by their texts.")
    return texts, [int(kind_of) for _, kind_of in content]


def _special(tokenizer: Any, ends: list[int], notes: list[str]) -> dict[str, int]:
    ids = {part: getattr(tokenizer, f"{part}_token_id", None) for part in _SPECIAL}
    further = [end for end in ends if end != ids["eos"]]
    if ids["eos"] is None:
        if not further:
            raise InputError("Neither the tokenizer nor the model's configuration names a token that ends an answer.")
        ids["eos"] = further.pop(0)
    ids |= dict(zip(("eot", "eom"), further, strict=False))
    if len(further) > 2:
        notes.append(f"of the tokens that end an answer, GGUF has no place for {', '.join(map(str, further[2:]))}")
    return {part: number for part, number in ids.items() if number is not None}


def _added(tokenizer: Any) -> dict[str, bool]:
    """Whether the tokenizer puts its first and last token around a text.

    Raises:
        InputError: it puts others there.
    """
    bare, whole = (tokenizer("a", add_special_tokens=add).input_ids for add in (False, True))
    around = {"bos": [tokenizer.bos_token_id], "eos": [tokenizer.eos_token_id]}
    for before, after in ((False, False), (True, False), (False, True), (True, True)):
        if whole == (around["bos"] if before else []) + bare + (around["eos"] if after else []):
            return {"bos": before, "eos": after}
    raise InputError(f"The tokenizer makes {whole} of a text whose tokens are {bare}; GGUF knows of its bos and eos alone.")


def _chat_template(tokenizer: Any) -> str | None:
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template
