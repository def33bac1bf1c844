"""`RwkvConfig`: the sizes of an RWKV-6 or RWKV-7 model."""

from typing import Any, Literal

from transformers import PreTrainedConfig

from bonetune.errors import InputError

Version = Literal["x060", "x070"]
VERSIONS: tuple[Version, ...] = ("x060", "x070")
# What each version's low-rank maps are of, and the ranks that RWKV-LM gives them at a width of up to 2048.
RANKS: dict[Version, dict[str, int]] = {
    "x060": {"maa": 32, "decay": 64},
    "x070": {"w": 64, "a": 64, "v": 32, "g": 128},
}


class RwkvConfig(PreTrainedConfig):
    """Sizes of an RWKV model; `bonetune.rwkv.from_pth` reads them from a file's tensors.

    Args:
        version: x060 (RWKV-6) or x070 (RWKV-7).
        vocab_size: rows of the embedding.
        hidden_size: features of a token; a multiple of `head_size`.
        intermediate_size: features inside the channel mixing; None: as RWKV-LM has it.
        num_hidden_layers: blocks.
        head_size: features of a head.
        ranks: of the low-rank maps, by the letters of `RANKS`; None: as RWKV-LM has them for small models.
        unused_in_first: x070: whether the first block has v0, v1 and v2, which nothing reads.
        initial_state: whether each block has a trained state to begin with (`att.time_state`: state tuning).
        kwargs: as every configuration of transformers takes them.

    Raises:
        InputError: an unknown version, or sizes that do not fit each other.
    """

    model_type = "bonetune-rwkv"
    keys_to_ignore_at_inference = ["state"]  # noqa: RUF012  (Trainer adds lists to it)

    def __init__(
        self,
        version: Version = "x070",
        vocab_size: int = 65536,
        hidden_size: int = 768,
        intermediate_size: int | None = None,
        num_hidden_layers: int = 12,
        head_size: int = 64,
        ranks: dict[str, int] | None = None,
        unused_in_first: bool = True,
        initial_state: bool = False,
        **kwargs: Any,
    ) -> None:
        if version not in VERSIONS:
            raise InputError(f"Unknown RWKV version {version!r}: choose from {', '.join(VERSIONS)}.")
        if head_size < 1 or hidden_size % head_size:
            raise InputError(f"A head size of {head_size} does not divide the hidden size {hidden_size}.")
        self.version = version
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size or _usual_width(version, hidden_size)
        self.num_hidden_layers = num_hidden_layers
        self.head_size = head_size
        self.ranks = RANKS[version] | (ranks or {})
        self.unused_in_first = unused_in_first
        self.initial_state = initial_state
        self.use_cache = True
        kwargs.setdefault("bos_token_id", 0)
        kwargs.setdefault("eos_token_id", 0)
        kwargs.setdefault("pad_token_id", 0)
        super().__init__(**{"tie_word_embeddings": False, **kwargs})

    @property
    def num_heads(self) -> int:
        """Heads of the time mixing."""
        return self.hidden_size // self.head_size


def _usual_width(version: Version, hidden_size: int) -> int:
    return 4 * hidden_size if version == "x070" else int(3.5 * hidden_size // 32 * 32)
