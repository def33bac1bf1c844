"""`bonetune estimate`."""

from pathlib import Path
from typing import Annotated

import typer


def estimate(
    config: Annotated[Path, typer.Argument(help="The run's settings (YAML or TOML).", metavar="CONFIG.yaml")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings that win over the file's.", metavar="key=value")
    ] = None,
    measured: Annotated[bool, typer.Option("--measure", help="Also load the model, take two steps, and measure.")] = False,
    largest: Annotated[
        bool, typer.Option("--largest", help="Leave the data unread: every example has max_length tokens.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Predict the most memory that a run takes, without loading the model's weights."""
    import dataclasses
    import json as json_module

    from rich.table import Table

    from bonetune.training.ingredients import read_data, resolved, tokenizer_of
    from bonetune.training.memory import CATEGORIES, measure, predict, worst_batch
    from bonetune_cli.console import console, out, quiet_libraries

    quiet_libraries()
    settings = resolved(config, overrides)
    lengths = None
    if not (largest or settings.streaming):
        lengths = read_data(settings, tokenizer_of(settings)).train.lengths
    batch = worst_batch(settings, lengths)
    with console.status("running a step without values"):
        predicted = predict(settings, batch)
    found = None
    if measured:
        with console.status("measuring"):
            found = measure(settings, batch)
    if json:
        facts = {"batch": dataclasses.asdict(batch), "predicted": predicted.to_dict()}
        out.print_json(json_module.dumps(facts | ({"measured": found.to_dict()} if found else {})))
        return
    way = "packed" if batch.packed else "padded"
    title = f"MiB on {predicted.device}, {len(batch.lengths)} examples of at most {max(batch.lengths)} tokens, {way}"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column("predicted", justify="right")
    if found:
        table.add_column("measured", justify="right")
    for name in CATEGORIES:
        table.add_row(name, _mib(getattr(predicted, name)))
    table.add_row("sum", _mib(predicted.total), _mib(found.total) if found else None, style="bold")
    if predicted.device == "cpu":
        table.add_row("the process itself", _mib(predicted.process), _mib(found.process) if found else None)
    out.print(table, soft_wrap=False)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f}"
