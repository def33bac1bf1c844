"""`bonetune eval`."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer


def evaluate(
    model: Annotated[str, typer.Argument(help="Model folder, hub id, or adapter folder.", metavar="MODEL_OR_ADAPTER")],
    tasks: Annotated[
        str,
        typer.Option(
            help="Tasks, separated by commas: exact-match, loss, gsm8k:strict, lm-eval:NAME, ...; docs/evaluation.md."
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="File of rows or data set of the hub, for all tasks; or TASK=FILE, once for each.", metavar="[TASK=]FILE"
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Score the first so many rows.")] = None,
    output_dir: Annotated[str | None, typer.Option(help="Where to write scores.json and a record for each item.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is in the output folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the output folder.")] = False,
    base: Annotated[
        str | None, typer.Option(help="The adapter's base model, if it has moved; of forgetting, the base.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    dataset_field: Annotated[str | None, typer.Option(help="Question's and answer's field: query,response.")] = None,
    dataset_format: Annotated[str | None, typer.Option(help="How rows are read; default: as in training.")] = None,
    prompt_template: Annotated[str | None, typer.Option(help="With {instruction} in it; default: the adapter's own.")] = None,
    dataset_split: Annotated[str | None, typer.Option(help="Split of the data, or a slice of it; default: the task's.")] = None,
    few_shot: Annotated[str | None, typer.Option(help="Data from which examples are shown, where a task shows some.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at a time.")] = 32,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer; default: the task's.")] = None,
    judge_url: Annotated[
        str | None, typer.Option(help="mt-bench: OpenAI-compatible endpoint of the judge: http://localhost:8000/v1.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="mt-bench: the judge's name there.")] = None,
    unsafe_code: Annotated[
        bool, typer.Option("--unsafe-code", help="Run programs that the model writes even where nothing holds them back.")
    ] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
) -> None:
    """Score a model or an adapter."""
    import bonetune
    from bonetune.errors import InputError
    from bonetune.evaluation import Judge
    from bonetune_cli.console import progress, quiet_libraries

    quiet_libraries()
    results: list[Any] = []
    with _shown_at_the_end(results, json), progress() as bars:
        wanted = [task.strip() for task in tasks.split(",") if task.strip()]
        lines = {task: bars.add_task(task, total=None, note="", visible=False) for task in wanted}
        if (judge_url is None) != (judge_model is None):
            raise InputError("--judge-url and --judge-model go together: give both, or neither.")
        bonetune.evaluate(
            model,
            wanted,
            data=_data(data or [], wanted),
            limit=limit,
            output_dir=output_dir,
            resume=resume,
            overwrite=overwrite,
            base=base,
            dtype=dtype,
            dataset_field=dataset_field.split(",") if dataset_field else None,
            dataset_format=dataset_format,
            prompt_template=prompt_template,
            dataset_split=dataset_split,
            few_shot=few_shot,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            judge=Judge(judge_url, judge_model) if judge_url and judge_model else None,
            unsafe_code=unsafe_code,
            trust_remote_code=trust_remote_code,
            on_items=lambda task, done, total: bars.update(lines[task], completed=done, total=total, visible=True),
            on_result=results.append,
        )


@contextmanager
def _shown_at_the_end(results: list[Any], as_json: bool) -> Iterator[None]:
    """Print the results there are when the block ends, also by an error, which loses none."""
    try:
        yield
    except BaseException:
        if results:
            _show(results, as_json)
        raise
    _show(results, as_json)


def _show(results: list[Any], as_json: bool) -> None:
    from bonetune.files import json_text
    from bonetune_cli.console import console, out

    for result in results:
        if not math.isfinite(result.score):
            console.print(f"warning: {result.task}: the score is {result.score}, no finite number", style="yellow")
    if as_json:
        out.print_json(json_text([result.summary() for result in results]))
        return
    for result in results:
        interval = f"  95% [{result.interval[0]:.3f}, {result.interval[1]:.3f}]" if result.interval else ""
        more = "".join(f"  {name} {value:.4f}" for name, value in result.metrics.items())
        out.print(f"{result.task}: {result.score:.4f}{interval}{more}  ({result.items} items)")
        out.print(f"  {result.protocol}", style="dim")


def _data(given: list[str], tasks: list[str]) -> str | dict[str, str] | None:
    """`--data`: one for all tasks, or one for each that is named."""
    from bonetune.errors import InputError

    named = {task: value for task in tasks for entry in given if (value := entry.removeprefix(f"{task}=")) != entry}
    others = [entry for entry in given if not any(entry.startswith(f"{task}=") for task in tasks)]
    if len(others) > 1 or (others and named):
        raise InputError(f"--data {others[0]} is for all tasks, and there is another: write TASK=FILE for each.")
    return others[0] if others else named or None
