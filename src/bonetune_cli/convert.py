"""`bonetune convert`."""

from typing import Annotated

import typer


def convert(
    src: Annotated[str, typer.Argument(help="Folder or file of the adapter; for gguf, a model.", metavar="SRC")],
    dst: Annotated[str, typer.Argument(help="Folder or file to write.", metavar="DST")],
    to: Annotated[str, typer.Option(help="peft-bone, miss, lora, rwkv-disha, gguf-lora or gguf.", metavar="FORMAT")],
    read_as: Annotated[
        str | None, typer.Option("--from", help="Format of SRC, if its files do not prove it.", metavar="FORMAT")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The adapter's base model, if it has moved.")] = None,
    variant: Annotated[str | None, typer.Option(help="Of files that do not say it.")] = None,
    rank: Annotated[int | None, typer.Option(help="Of the LoRA of a BAT variant; r unless given.")] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the tensors written: auto, float32, bfloat16, float16, or q8_0 for gguf.")
    ] = "auto",
    certify: Annotated[str, typer.Option(help="auto, tensors, layers or logits.")] = "auto",
    tolerance: Annotated[float | None, typer.Option(help="Largest error accepted, as a share of the update.")] = None,
    pre_tokenizer: Annotated[
        str | None, typer.Option(help="gguf: llama.cpp's name for how texts are cut, if it is not recognised.")
    ] = None,
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Convert BAT for another base model than it was trained on.")
    ] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what lies at DST.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Write an adapter in another format, and prove it the same."""
    import json as json_module

    import bonetune
    from bonetune_cli.console import console, out, quiet_libraries

    quiet_libraries()
    with console.status("reading, writing, reading again, comparing"):
        result = bonetune.convert(
            src,
            dst,
            to=to,
            read_as=read_as,
            base=base,
            variant=variant,
            rank=rank,
            dtype=dtype,
            certify=certify,
            tolerance=tolerance,
            pre_tokenizer=pre_tokenizer,
            any_base=any_base,
            trust_remote_code=trust_remote_code,
            overwrite=overwrite,
        )
    if json:
        out.print_json(json_module.dumps(result.to_dict()))
        return
    ranks = sorted({written.rank for written in result.layers.values() if written.rank})
    lora = f" as LoRA of rank {', '.join(map(str, ranks))}" if ranks else ""
    whole = f", {len(result.whole)} tensors trained whole" if result.whole else ""
    kind = f" ({result.read_as}, {result.variant}): {len(result.layers)} layers{lora}{whole}" if result.variant else ""
    out.print(f"{src}{kind}")
    for note in result.notes:
        out.print(f"  {note}")
    out.print(f"{result.output} ({result.written_as}): {result.certificate}")
