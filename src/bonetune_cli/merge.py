"""`bonetune merge`."""

import os
from pathlib import Path
from typing import Annotated

import typer


def merge(
    adapter: Annotated[str, typer.Argument(help="Folder of the adapter.", metavar="ADAPTER")],
    output: Annotated[str, typer.Option(help="Folder to write the merged model to.", metavar="PATH")],
    base: Annotated[str | None, typer.Option(help="The adapter's base model, if it has moved.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the merged weights: auto, float32, bfloat16 or float16.")] = "auto",
    scale: Annotated[float, typer.Option(help="Factor of the update.")] = 1.0,
    into: Annotated[
        str, typer.Option(help="After training on quantized weights: their values (trained), or the weights before (original).")
    ] = "trained",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the output folder holds.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the certificate as JSON.")] = False,
) -> None:
    """Merge an adapter into its base model, and prove the result equal to the adapted model."""
    import json as json_module

    import bonetune
    from bonetune_cli.console import console, out, quiet_libraries

    quiet_libraries()
    with console.status("merging, writing, loading again, comparing"):
        result = bonetune.merge(adapter, output, base=base, dtype=dtype, scale=scale, into=into, overwrite=overwrite)
    _report_again(Path(adapter))
    if json:
        other = result.other.to_dict() if result.other else None
        more = {"into": result.into, "other": other} if result.into else {}
        out.print_json(json_module.dumps(result.certificate.to_dict() | more))
        return
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
