"""RWKV's "world" tokenizer as one of Hugging Face's: the longest match of byte strings, from the left."""

import ast
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AddedToken, PreTrainedTokenizer

from bonetune.errors import InputError

END_OF_TEXT = "<|rwkv_tokenizer_end_of_text|>"
VOCABULARY_FILE = "rwkv_vocab_v20230424.txt"
_LARGEST_ID = 65535  # the encoder has 16 bits for it
# "User: ...\n\nAssistant:", after which the model writes " ...": tokens begin with their space.
_CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ('system', 'user', 'assistant') -%}"
    "{{- raise_exception('only system, user and assistant speak in it') -}}"
    "{%- endif -%}"
    "{{- message['role'] | capitalize + ': ' + message['content'] | trim + '\\n\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}"
)


class WorldTokenizer(PreTrainedTokenizer):
    """The tokenizer of RWKV's "world" models.

    A token is a string of bytes, which need not be whole characters of UTF-8. Its name here has a character for each byte
    (latin-1); `decode` joins the bytes first. Id 0 ends a text, and pads; nothing opens one. Another token may be made the end
    of text (`tokenizer.eos_token = "\\n\\n"`): texts are then cut where it stands before the longest matches are looked for, so
    that three line ends, otherwise one token, become it and a single one, or at the very end of a text a single one and it.
    Elsewhere the tokens stay what they are.

    Args:
        vocab_file: lines of id (1, 2, ...), Python literal, number of bytes; None: RWKV's own, of the package
            pyrwkv-tokenizer.
        kwargs: as every tokenizer of transformers takes them.

    Raises:
        InputError: pyrwkv-tokenizer is not installed, or the file is no such vocabulary.
    """

    vocab_files_names = {"vocab_file": VOCABULARY_FILE}  # noqa: RUF012  (as transformers has it)
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str | None = None, **kwargs: Any) -> None:
        self._text = _own_vocabulary() if vocab_file is None else _read(Path(vocab_file))
        self._bytes = _parsed(self._text, vocab_file or VOCABULARY_FILE)
        self._ids = {content.decode("latin-1"): number for number, content in self._bytes.items()}
        self._encoder: Any = None
        self._added_tokens_decoder = {0: AddedToken(END_OF_TEXT, special=True, normalized=False)}
        settings = {
            "eos_token": END_OF_TEXT,
            "pad_token": END_OF_TEXT,
            "chat_template": _CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
        }
        super().__init__(**{**settings, **kwargs})

    @property
    def vocab_size(self) -> int:
        """Ids, unused ones included."""
        return max(self._bytes) + 1

    def get_vocab(self) -> dict[str, int]:
        """Ids by the tokens' names."""
        return {END_OF_TEXT: 0} | self._ids | self._added_tokens_encoder

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        """The names of a text's tokens."""
        if kwargs.get("split_special_tokens", self.split_special_tokens):
            return self._tokenize(text)
        # an end of text that was merely set is not among the added ones
        special = {token for token in self.all_special_tokens if token in self._ids}
        whole = sorted(special | self._added_tokens_encoder.keys(), key=len, reverse=True)
        # what was appended to a text stays whole, whatever the text ends with
        last = [token for token in whole if text.endswith(token)][:1]
        parts = re.split(f"({'|'.join(map(re.escape, whole))})", text.removesuffix("".join(last)))
        names: list[str] = []
        for number, part in enumerate(parts):
            names += [part] if number % 2 else self._tokenize(part)
        return names + last

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        if not text:
            return []
        if self._encoder is None:
            self._encoder = _encoder(self._text)
        return [self._convert_id_to_token(number) for number in self._encoder.encode(text)]

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        # models have a few more rows than there are tokens, and an untrained one may say any of them
        return self._bytes.get(index, b"").decode("latin-1")

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text that tokens are; bytes that are no whole character become the replacement character."""
        content = b"".join(token.encode("latin-1" if token in self._ids else "utf-8") for token in tokens)
        return content.decode("utf-8", errors="replace")

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write the vocabulary's file to a folder."""
        file = Path(save_directory) / (f"{filename_prefix}-{VOCABULARY_FILE}" if filename_prefix else VOCABULARY_FILE)
        file.write_bytes(self._text.encode())
        return (str(file),)

    def __getstate__(self) -> dict[str, Any]:
        """Without the encoder, which is made again where it is needed."""
        return {**self.__dict__, "_encoder": None}


def _own_vocabulary() -> str:
    return _read(Path(_package().__file__).parent / VOCABULARY_FILE)


def _package() -> Any:
    try:
        import pyrwkv_tokenizer
    except ImportError as error:
        raise InputError("RWKV's tokenizer needs a package that is not installed: pip install 'bonetune[rwkv]'.") from error
    return pyrwkv_tokenizer


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Vocabulary {path} cannot be read: {error}") from error


@cache
def _parsed(text: str, source: str) -> dict[int, bytes]:
    """The tokens' bytes by id."""
    tokens: dict[int, bytes] = {}
    seen: set[bytes] = set()
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if not line:
            continue
        try:
            index, rest = line.split(" ", 1)
            literal, size = rest.rsplit(" ", 1)
            content = ast.literal_eval(literal)
            content = content.encode() if isinstance(content, str) else content
            well_formed = isinstance(content, bytes) and len(content) == int(size) > 0
            # without a gap: transformers counts the tokens to number those that are added
            if not well_formed or int(index) != len(tokens) + 1 or content in seen:
                raise ValueError(line)
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise InputError(
                f"Vocabulary {source}, line {number}: {line[:60]!r} is not id {len(tokens) + 1}, the literal of a token that "
                "no line before has, and its number of bytes: copy the file anew."
            ) from error
        if int(index) > _LARGEST_ID:
            raise InputError(f"Vocabulary {source}, line {number}: more than {_LARGEST_ID} tokens: leave the rest out.")
        tokens[int(index)] = content
        seen.add(content)
    # else a text might hold a byte that no token matches
    missing = set(range(256)) - {content[0] for content in tokens.values() if len(content) == 1}
    if missing:
        raise InputError(f"Vocabulary {source} has no token for {len(missing)} of the 256 bytes: it is not whole.")
    return tokens


@cache
def _encoder(text: str) -> Any:
    """The package's encoder, which reads a file, and knows one way of writing each token: as text if it is text."""
    lines = []
    for number, content in _parsed(text, VOCABULARY_FILE).items():
        try:
            literal = repr(content.decode())
        except UnicodeDecodeError:
            literal = repr(content)
        lines.append(f"{number} {literal} {len(content)}\n")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / VOCABULARY_FILE
        file.write_text("".join(lines), encoding="utf-8")
        return _package().RWKVTokenizer(vocab_filepath=str(file))
