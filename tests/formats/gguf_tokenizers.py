"""Small tokenizers of every kind that GGUF files are written of, and texts that tell them apart."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

SIZE = 640
TEXTS = [
    "Hello world, it's you're THEY'LL I'D don't",
    "  leading,   inner    and trailing spaces   ",
    "tabs\tand\n\n\nnewlines \n x\r\n y",
    "1 12 123 1234 12345 3.14159 1,000,000 x2 v10",
    "def f(x):\n    return x**2  # ok\n\tif x != 3: pass\n",
    "héllo ÜBER straße ñandú ÀÉÎ",
    "日本語のテキスト 中文字 한국어 텍스트",
    "🚀🌫️ 👩‍👩‍👧 flags 🇩🇪",
    "Привет мир ελληνικά עברית العربية हिन्दी",
    "٣٤٥ Ⅷ ½ ² x²",
    "a\u0301 decomposed e\u0300",
    "\u00a0nbsp\u3000wide\u2003em",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>",
    "camelCaseWords HTTPServer snake_case kebab-case /a/b",
    "?!...---===''\"\"``",
    "",
    " ",
    "\n",
    "x",
]
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = f"{CONTRACTIONS}|{LETTERS}|\\p{{N}}{{1,3}}|{REST}"
QWEN2 = f"{CONTRACTIONS}|{LETTERS}|\\p{{N}}|{REST}"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    f"[^\\r\\n\\p{{L}}\\p{{N}}]?{UPPER}*{LOWER}+|[^\\r\\n\\p{{L}}\\p{{N}}]?{UPPER}+{LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def bytes_after(*stages, use_regex=False):
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    return pre_tokenizers.Sequence([*stages, last]) if stages else last


def split(pattern):
    return pre_tokenizers.Split(Regex(pattern), "isolated")


# llama.cpp's names to how texts are cut, and whether pieces that are tokens stay whole.
BYTE_LEVEL = {
    "gpt-2": (bytes_after(use_regex=True), False),
    "smollm": (bytes_after(pre_tokenizers.Digits(individual_digits=True), use_regex=True), False),
    "llama-bpe": (bytes_after(split(LLAMA3)), True),
    "smaug-bpe": (bytes_after(split(LLAMA3)), False),
    "qwen2": (bytes_after(split(QWEN2)), False),
    "tekken": (bytes_after(split(TEKKEN)), True),
}


def finished(tokenizer, bos=False):
    tokenizer.add_special_tokens(["<bos>", "<|im_end|>", "<|im_start|>"])
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    if bos:
        tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<|im_end|>")


def byte_level(name, bos=False):
    """A tokenizer that cuts texts as llama.cpp's pre-tokenizer of that name does, with merges from the texts above."""
    cutting, whole = BYTE_LEVEL[name]
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole))
    tokenizer.pre_tokenizer, tokenizer.decoder = cutting, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=SIZE - 8, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    return finished(tokenizer, bos)


def sentencepiece(prefix=True, scheme=None):
    """One of SentencePiece's kind: all pairs that make a token are merges, in the order of the tokens.

    `scheme`: how a pre-tokenizer puts a space before a text; None: a normalizer does.
    """
    words = sorted({word for text in TEXTS for word in text.split()})
    pieces = {piece for word in ["\u2581" + word for word in words] + words for piece in prefixes(word)}
    pieces |= {"\u2581" * count for count in range(1, 5)}
    longer = sorted((piece for piece in pieces if len(piece) > 1), key=lambda piece: (len(piece), piece[::-1]))[:250]
    letters = sorted({letter for piece in longer for letter in piece})
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": 1 + byte for byte in range(256)}
    for piece in [*longer, *letters]:
        vocab.setdefault(piece, len(vocab))
    merges = [
        (piece[:cut], piece[cut:])
        for piece in longer
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "\u2581")
    if scheme is not None:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme=scheme, split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replace]) if prefix else replace
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast = finished(tokenizer, bos=True)
    fast.unk_token = "<unk>"
    return fast


def prefixes(word):
    return [word[:length] for length in range(1, len(word) + 1)]
