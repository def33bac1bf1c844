"""`bonetune train`."""

from pathlib import Path
from typing import Annotated

import typer


def train(
    config: Annotated[Path, typer.Argument(help="YAML file with the run's settings.", metavar="CONFIG.yaml")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings that win over the file's.", metavar="key=value")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, show what would be trained, and stop.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in output_dir.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in output_dir.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Fine-tune a causal language model."""
    import dataclasses
    import json as json_module

    import bonetune
    from bonetune.training import plan
    from bonetune_cli.console import console, out, progress, quiet_libraries, training_note

    quiet_libraries()
    if dry_run:
        planned = plan(config, overrides, resume=resume, overwrite=overwrite)
        out.print(planned.describe())
        out.print(planned.config.to_yaml(), end="")
        return
    with progress() as bars:
        bar = bars.add_task("training", total=None, note="", visible=False)
        result = bonetune.train(
            config,
            overrides,
            resume=resume,
            overwrite=overwrite,
            on_plan=lambda planned: console.print(planned.describe()),
            on_progress=lambda p: bars.update(bar, visible=True, total=p.steps, completed=p.step, note=training_note(p)),
        )
    if json:
        out.print_json(json_module.dumps(dataclasses.asdict(result)))
        return
    out.print(
        f"{result.steps} steps in {result.seconds:.0f} s, loss {result.first_loss:.3f} to {result.last_loss:.3f}. "
        f"Adapter, metrics.jsonl and loss.png are in {result.output_dir}"
    )
