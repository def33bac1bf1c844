"""`bonetune tokenize`: rows to token files that training reads as they are."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

from bonetune.data import PAPER_PROMPT, stream_rows, write_binidx
from bonetune.data.binidx import files_of
from bonetune.data.encoding import encode_stream
from bonetune.data.formats import Kind
from bonetune.data.sources import detected, naming
from bonetune.errors import InputError, RunError
from bonetune.files import no_room
from bonetune.models import load_tokenizer

UNLIMITED = 1 << 40  # tokens


@dataclass(frozen=True)
class Tokenized:
    """What `tokenize` has written.

    Args:
        output: what the names of both files begin with.
        documents: how many there are, one for each row.
        tokens: of all documents.
        empty: rows with nothing to learn, left out.
        dtype: of the ids in the file.
    """

    output: str
    documents: int
    tokens: int
    empty: int
    dtype: str


def tokenize(
    data: str,
    output: str,
    *,
    model: str,
    dataset_field: Sequence[str] | None = None,
    dataset_split: str = "train",
    dataset_format: Kind | Literal["auto"] = "auto",
    prompt_template: str = PAPER_PROMPT,
    eos_token: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> Tokenized:
    """Write the token ids of rows to a pair of files, `output`.bin and `output`.idx, as Megatron and RWKV read them.

    The ids are those that training would make of the rows, each with the end-of-text token at its end; rows that hold ids are
    taken as they are. Such files do not tell prompts from answers: trained on, all of a row is learned. Rows are read as they
    are needed.

    Args:
        data: a file of rows or a data set of the hub, in any format that training a causal language model takes.
        output: what the names of both files begin with, or one of the names.
        model: whose tokenizer is taken: a folder or an id on the hub, of a model, an adapter or a tokenizer alone.
        dataset_field: names of the fields, in the order that `RowFormat` describes.
        dataset_split: split of a data set of the hub, or a slice of any: train[:5000].
        dataset_format: how rows are read, or `auto`.
        prompt_template: with `{instruction}` in it.
        eos_token: the token that ends a row, where it is not the tokenizer's own.
        trust_remote_code: run code that comes with the tokenizer.
        overwrite: replace files that are there.

    Raises:
        InputError: data or a tokenizer that cannot be read, rows without any text, files that are there. Nothing is written.
        RunError: the disk is full. Nothing stays of what was written.

    Example:
        >>> bonetune.tokenize("train.jsonl", "train", model="models/small").tokens
    """
    index, content = files_of(output)
    there = [str(file) for file in (index, content) if file.exists()]
    if there and not overwrite:
        raise InputError(f"{' and '.join(there)} already there: choose another output, or pass --overwrite (overwrite=True).")
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code, eos_token=eos_token)
    dtype, outcomes = "uint16" if len(tokenizer) <= 1 << 16 else "int32", Counter[str]()

    def documents() -> Iterator[list[int]]:
        rows = stream_rows(data, dataset_split)
        first = next(rows)
        told: dict[str, Any] = {"dataset_field": dataset_field, "template": prompt_template, "kind": dataset_format}
        row_format = detected(data, first, told)
        with naming(data):
            for example in encode_stream(chain([first], rows), row_format, tokenizer, UNLIMITED, outcomes=outcomes):
                yield example.input_ids

    try:
        number, tokens = write_binidx(content, documents(), dtype)
    except OSError as error:
        if (words := no_room(error)) is None:
            raise
        raise RunError(f"{content} could not be written ({words}): make room, or choose another output.") from error
    return Tokenized(str(content.with_suffix("")), number, tokens, outcomes["empty"], dtype)
