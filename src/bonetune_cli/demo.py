"""`bonetune demo`."""

from typing import Annotated

import typer


def demo(
    variant: Annotated[str, typer.Option(help="bone, mini, bat, bat-row, bat-free or bat-left.")] = "bone",
    r: Annotated[int, typer.Option(min=1, help="Shard size.")] = 64,
    steps: Annotated[int, typer.Option(help="Optimizer steps, of 8 problems each.")] = 40,
    seed: Annotated[int, typer.Option(help="One seed, one result.")] = 0,
    learning_rate: Annotated[float | None, typer.Option(help="Default: by variant and r.")] = None,
    output_dir: Annotated[str, typer.Option(help="Where everything is written.")] = "bonetune-demo",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier demonstration.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Do the whole job once, on a small real model and generated problems."""
    import json as json_module

    from rich.table import Table
    from rich.text import Text

    import bonetune
    from bonetune_cli.console import console, out, progress, quiet_libraries, training_note

    quiet_libraries()
    with progress() as bars:
        bar = bars.add_task("", total=None, note="", visible=False)

        def show(description: str, done: int, total: int, note: str = "") -> None:
            bars.update(bar, visible=True, description=description, completed=done, total=total, note=note)

        result = bonetune.demo(
            variant,
            r=r,
            steps=steps,
            seed=seed,
            learning_rate=learning_rate,
            output_dir=output_dir,
            overwrite=overwrite,
            say=console.print,
            on_progress=lambda p: show("training", p.step, p.steps, training_note(p)),
            on_items=lambda task, done, total: show("answers", done, total),
        )
    if json:
        out.print_json(json_module.dumps(result.to_dict()))
    else:
        table = Table(title=f"Exact match on {result.untrained.total} problems, with 95% intervals", title_justify="left")
        table.add_column("")
        table.add_column("correct", justify="right")
        table.add_row("untrained model", str(result.untrained))
        table.add_row("most frequent answer", str(result.most_frequent))
        table.add_row(f"{variant}, r={r}, {result.steps} steps", Text(str(result.trained), style="bold"))
        out.print(table, soft_wrap=False)
        out.print(f"Probability that training changed nothing (exact sign test): {result.p_value:.2g}")
        out.print(f"Merged model: {result.certificate}")
        spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result.seconds.items())
        out.print(f"Time: {spent}. Everything is in {result.output_dir}/ (adapter/loss.png shows the loss).")
    if not result.gained:
        raise typer.Exit(1)
