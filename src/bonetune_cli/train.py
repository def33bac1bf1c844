"""`bonetune train`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from bonetune.training import Plan

# Examples of the batch that a dry run shows, and characters of each.
SHOWN_EXAMPLES, SHOWN_CHARACTERS = 4, 1200


def train(
    config: Annotated[Path, typer.Argument(help="YAML or TOML file with the run's settings.", metavar="CONFIG")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings that win over the file's.", metavar="key=value")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, show a batch, memory and time expected, and stop.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last whole checkpoint in output_dir.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in output_dir.")] = False,
    no_rehearsal: Annotated[
        bool, typer.Option("--no-rehearsal", help="No trial evaluation and checkpoint before the first step.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Fine-tune a model. Several devices: torchrun --nproc-per-node gpu --no-python bonetune train CONFIG."""
    import dataclasses
    import json as json_module

    import bonetune
    from bonetune.training import plan
    from bonetune_cli.console import console, out, progress, quiet_libraries, training_note

    quiet_libraries()
    settings = [*(overrides or []), *(["rehearsal=false"] if no_rehearsal else [])]
    if dry_run:
        planned = plan(config, settings, resume=resume, overwrite=overwrite)
        _show(planned)
        return
    with progress() as bars:
        bar = bars.add_task("training", total=None, note="", visible=False)

        def begin(planned: "Plan") -> None:
            console.print(planned.describe())
            _say_findings(planned)

        result = bonetune.train(
            config,
            settings,
            resume=resume,
            overwrite=overwrite,
            on_plan=begin,
            on_progress=lambda p: bars.update(bar, visible=True, total=p.steps, completed=p.step, note=training_note(p)),
        )
    if os.environ.get("RANK", "0") != "0":
        return
    if json:
        out.print_json(json_module.dumps(dataclasses.asdict(result)))
        return
    out.print(
        f"{result.steps} steps in {result.seconds:.0f} s, loss {result.first_loss:.3f} to {result.last_loss:.3f}. "
        f"The adapter, report.html, metrics.jsonl and loss.png are in {result.output_dir}"
    )


def _show(planned: "Plan") -> None:
    """What a dry run has found out: the run, its data, a batch with its mask, memory, time, all settings."""
    from bonetune.training import expected_seconds
    from bonetune_cli.console import out

    out.print(planned.describe())
    _say_findings(planned)
    out.print("")
    _show_batch(planned)
    out.print("")
    seconds = expected_seconds(planned)
    _show_memory(planned)
    out.print(f"Time expected here: {_duration(seconds)} for {planned.steps:,} steps, by one of its batches.")
    out.print("")
    out.print(planned.config.to_yaml(), end="")


def _show_memory(planned: "Plan") -> None:
    from bonetune.errors import InputError
    from bonetune.training.memory import predict, worst_batch
    from bonetune_cli.console import out

    try:
        expected = predict(planned.config, worst_batch(planned.config, planned.train.lengths))
    except InputError as error:
        out.print(f"Memory expected: unknown. {error}")
        return
    beside = ", beside the process itself" if expected.process else ""
    out.print(f"Memory expected: {expected.total / 2**30:.2f} GiB{beside}; `bonetune estimate` tells more.")


def _say_findings(planned: "Plan") -> None:
    from bonetune_cli.console import console

    for note in planned.notes:
        console.print(f"note: {note}", style="yellow")


def _show_batch(planned: "Plan") -> None:
    """The first step's first examples: what is learned in green, the rest dim."""
    from rich.text import Text

    from bonetune.data import pieces
    from bonetune_cli.console import out

    numbers = planned.batches.epoch(0)[0][:SHOWN_EXAMPLES]
    out.print(f"{len(numbers)} of the first step's examples; what is learned is green and underlined:")
    if planned.config.task_type != "CAUSAL_LM":
        _show_targets(planned, numbers)
        return
    for number in numbers:
        example = planned.train[int(number)]
        text = Text()
        for piece, supervised in pieces(example, planned.loaded.tokenizer):
            text.append(piece, style="green underline" if supervised else "dim")
        out.print(Text(f"[row {example.row}, {len(example.input_ids)} tokens] ", style="bold").append(_shortened(text)))


def _show_targets(planned: "Plan", numbers: Any) -> None:
    """What a classifier or an encoder-decoder is given and is to answer."""
    from rich.text import Text

    from bonetune_cli.console import out

    decode = planned.loaded.tokenizer.decode
    for number in numbers:
        example = planned.train[int(number)]
        if planned.config.task_type == "SEQ_CLS":
            label = example.labels[0]
            answer = planned.classes[int(label)] if planned.classes else str(label)
        else:
            answer = decode(example.labels)
        text = _shortened(Text(decode(example.input_ids), style="dim"))
        given = Text(f"[row {example.row}, {len(example.input_ids)} tokens] ", style="bold").append(text)
        out.print(given.append(" -> ").append(answer, style="green underline"))


def _shortened(text: Any) -> Any:
    """The beginning and the end of a long text."""
    if len(text) <= SHOWN_CHARACTERS:
        return text
    half = SHOWN_CHARACTERS // 2
    return text[:half].append(" [...] ").append(text[len(text) - half :])


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
