"""`bonetune merge`."""

import os
from pathlib import Path
from typing import Annotated

import typer


def merge(
    adapters: Annotated[
        list[str],
        typer.Argument(
            help="Folders of one or more adapters; their updates add up. The tokenizer is the first one's.",
            metavar="ADAPTER...",
        ),
    ],
    output: Annotated[str, typer.Option(help="Folder to write the merged model to.", metavar="PATH")],
    base: Annotated[str | None, typer.Option(help="The adapter's base model, if it has moved.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the merged weights: auto, float32, bfloat16 or float16.")] = "auto",
    scale: Annotated[
        list[float] | None, typer.Option(help="Factor of the update: once for all adapters, or once for each.")
    ] = None,
    into: Annotated[
        str, typer.Option(help="After training on quantized weights: their values (trained), or the weights before (original).")
    ] = "trained",
    certify: Annotated[
        str,
        typer.Option(help="What is compared: what the models say (logits), each weight (layers), or as memory allows (auto)."),
    ] = "auto",
    tolerance: Annotated[
        float | None, typer.Option(help="By how much outputs may differ, relative to their size; else what rounding explains.")
    ] = None,
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Merge into another base model than was trained on, or a second time.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the output folder holds.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the base model or the adapters.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the certificate as JSON.")] = False,
) -> None:
    """Merge adapters into their base model, and prove the result equal to the adapted model.

    Called again after it was interrupted, it goes on with what is missing.
    """
    import json as json_module

    import bonetune
    from bonetune_cli.console import console, out, quiet_libraries

    quiet_libraries()
    with console.status("merging, writing, reading again, comparing"):
        result = bonetune.merge(
            adapters,
            output,
            base=base,
            dtype=dtype,
            scale=scale or 1.0,
            into=into,
            certify=certify,
            tolerance=tolerance,
            any_base=any_base,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
        )
    for adapter in adapters:
        _report_again(Path(adapter))
    if json:
        other = result.other.to_dict() if result.other else None
        more = {"into": result.into, "other": other} if result.into else {}
        out.print_json(json_module.dumps(result.certificate.to_dict() | more))
        return
    if result.in_memory is not None:
        console.print(f"Merged in memory, because {result.in_memory}.")
    out.print(f"{result.output}: {result.certificate}")
    if result.other is not None:
        merged, other = (
            ("their values", "the original weights") if result.into == "trained" else ("the original weights", "their values")
        )
        out.print(f"It was trained on quantized weights; merged into {merged}. The model over {other} is {result.other}")


def _report_again(run: Path) -> None:
    """The run's report and card with the certificate in them, if the adapter comes with a run."""
    from bonetune.files import RUN_FILE
    from bonetune.training.folder import METRICS_FILE
    from bonetune.training.model_card import write_card
    from bonetune.training.report_page import write_report

    if all((run / name).is_file() for name in (RUN_FILE, METRICS_FILE)) and os.access(run, os.W_OK):
        write_report(run)
        write_card(run)
