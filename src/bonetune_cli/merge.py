"""`bonetune merge`."""

from typing import Annotated

import typer


def merge(
    adapter: Annotated[str, typer.Argument(help="Folder of the adapter.", metavar="ADAPTER")],
    output: Annotated[str, typer.Option(help="Folder to write the merged model to.", metavar="PATH")],
    base: Annotated[str | None, typer.Option(help="The adapter's base model, if it has moved.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the merged weights: auto, float32, bfloat16 or float16.")] = "auto",
    scale: Annotated[float, typer.Option(help="Factor of the update.")] = 1.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the output folder holds.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the certificate as JSON.")] = False,
) -> None:
    """Merge an adapter into its base model, and prove the result equal to the adapted model."""
    import json as json_module

    import bonetune
    from bonetune_cli.console import console, out, quiet_libraries

    quiet_libraries()
    with console.status("merging, writing, loading again, comparing"):
        result = bonetune.merge(adapter, output, base=base, dtype=dtype, scale=scale, overwrite=overwrite)
    if json:
        out.print_json(json_module.dumps(result.certificate.to_dict()))
    else:
        out.print(f"{result.output}: {result.certificate}")
