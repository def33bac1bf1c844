"""`bonetune tokenize`."""

from typing import Annotated

import typer


def tokenize(
    data: Annotated[str, typer.Argument(help="File of rows (.jsonl, .json, .csv, .parquet) or a data set of the hub.")],
    output: Annotated[str, typer.Argument(help="Files to write: OUTPUT.bin and OUTPUT.idx.", metavar="OUTPUT")],
    model: Annotated[str, typer.Option(help="Folder or hub id of the model, or the tokenizer, to read texts with.")],
    dataset_field: Annotated[
        str | None, typer.Option(help="The text's field, or question's and answer's: query,response.")
    ] = None,
    dataset_split: Annotated[str, typer.Option(help="Split of a data set of the hub, or a slice: train[:5000].")] = "train",
    dataset_format: Annotated[str, typer.Option(help="How rows are read; auto tells from their fields.")] = "auto",
    prompt_template: Annotated[str | None, typer.Option(help="With {instruction} in it; default: the papers'.")] = None,
    eos_token: Annotated[str | None, typer.Option(help="Token that ends a row; default: the tokenizer's own.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the tokenizer.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print documents and tokens as JSON.")] = False,
) -> None:
    """Make token files (.bin with .idx) of rows, for training on all of each."""
    import json as json_module
    from dataclasses import asdict
    from typing import Any, cast

    import bonetune
    from bonetune_cli.console import console, out, quiet_libraries

    quiet_libraries()
    with console.status("tokenizing"):
        result = bonetune.tokenize(
            data,
            output,
            model=model,
            dataset_field=dataset_field.split(",") if dataset_field else None,
            dataset_split=dataset_split,
            dataset_format=cast(Any, dataset_format),
            **({} if prompt_template is None else {"prompt_template": prompt_template}),
            eos_token=eos_token,
            trust_remote_code=trust_remote_code,
            overwrite=overwrite,
        )
    if json:
        out.print_json(json_module.dumps(asdict(result)))
        return
    left_out = f"; {result.empty} rows without text left out" if result.empty else ""
    out.print(f"{result.output}.bin: {result.documents} documents, {result.tokens} tokens as {result.dtype}{left_out}")
