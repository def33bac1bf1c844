"""From files of rows to masked token sequences and batches."""

from bonetune.data.binidx import binidx_rows, write_binidx
from bonetune.data.encoding import Lengths, encode_rows
from bonetune.data.examples import Encoded, EncodedSet
from bonetune.data.formats import PAPER_PROMPT, RowFormat, Segment
from bonetune.data.generated import reasoning_problems
from bonetune.data.preflight import Finding
from bonetune.data.prepare import Prepared, prepare
from bonetune.data.reading import read_rows, stream_rows
from bonetune.data.show import marked, pieces
from bonetune.data.streaming import ExampleStream, stream
from bonetune.data.tokens import prompt_tokens

__all__ = [
    "PAPER_PROMPT",
    "Encoded",
    "EncodedSet",
    "ExampleStream",
    "Finding",
    "Lengths",
    "Prepared",
    "RowFormat",
    "Segment",
    "binidx_rows",
    "encode_rows",
    "marked",
    "pieces",
    "prepare",
    "prompt_tokens",
    "read_rows",
    "reasoning_problems",
    "stream",
    "stream_rows",
    "write_binidx",
]
