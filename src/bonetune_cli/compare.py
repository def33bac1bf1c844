"""`bonetune compare`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from bonetune.experiments import ComparisonPlan, Progress


def compare(
    config: Annotated[Path, typer.Argument(help="YAML or TOML file with the comparison's settings.", metavar="CONFIG.yaml")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings that win over the file's: train.max_steps=10.", metavar="key=value")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, show the methods and their sizes, and stop.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the comparison in output_dir.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the comparison in output_dir.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Compare fine-tuning methods: learning rates swept, several seeds, paired statistics, one report."""
    import bonetune
    from bonetune.experiments import load_comparison, plan_comparison
    from bonetune_cli.console import console, out, quiet_libraries

    quiet_libraries()
    if dry_run:
        settings = load_comparison(config, overrides)
        _show(plan_comparison(settings), len(settings.seeds))
        return
    result = bonetune.compare(
        config,
        overrides,
        resume=resume,
        overwrite=overwrite,
        on_run=lambda progress: console.print(_line(progress)),
    )
    if json:
        out.print_json(result.results_file.read_text(encoding="utf-8"))
        return
    for sentence in result.analysis.summary:
        out.print(sentence.replace("`", ""))
    out.print(f"{result.report} has tables, curves and settings; results.json, runs.csv and curves.csv lie beside it.")


def _line(progress: "Progress") -> str:
    outcome, trial = progress.outcome, progress.outcome.trial
    if outcome.failure is not None:
        found = outcome.failure
    elif progress.counts:
        found = ", ".join(f"{name} {result.score:.4f}" for name, result in outcome.results.items())
    else:
        found = f"validation {outcome.validation:.4f}"
    about = f"{trial.method}, rate {trial.learning_rate:g}, seed {trial.seed}"
    return f"[{progress.done} of {progress.known}] {about}: {found} ({outcome.train_seconds:.0f} s of training)"


def _show(planned: "ComparisonPlan", seeds: int) -> None:
    from bonetune_cli.console import out

    for note in planned.notes:
        out.print(f"Note: {note.replace('`', '')}")
    for plan in planned.methods:
        size, rates = plan.sized, ", ".join(f"{rate:g}" for rate in plan.rates)
        what = f"{plan.described} (r matched)" if size.matched else plan.described
        out.print(f"{size.name}: {what}: {size.trainable_parameters:,} trainable parameters; learning rates {rates}")
    swept = sum(len(plan.rates) for plan in planned.methods if len(plan.rates) > 1)
    counting = seeds * len(planned.methods)
    if swept:
        out.print(f"At least {swept} runs to choose the learning rates, and {counting} that count.")
    else:
        out.print(f"{counting} runs, all of which count: each method has one learning rate.")
