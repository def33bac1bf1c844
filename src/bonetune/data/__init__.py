"""From files of rows to masked token sequences and batches."""

from bonetune.data.encoding import Encoded, Lengths, collate, encode_rows, prompt_tokens
from bonetune.data.formats import PAPER_PROMPT, RowFormat, Segment
from bonetune.data.generated import reasoning_problems
from bonetune.data.reading import read_rows

__all__ = [
    "PAPER_PROMPT",
    "Encoded",
    "Lengths",
    "RowFormat",
    "Segment",
    "collate",
    "encode_rows",
    "prompt_tokens",
    "read_rows",
    "reasoning_problems",
]
