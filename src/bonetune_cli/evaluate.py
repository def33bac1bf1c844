"""`bonetune eval`."""

from typing import Annotated

import typer


def evaluate(
    model: Annotated[str, typer.Argument(help="Model folder, hub id, or adapter folder.", metavar="MODEL_OR_ADAPTER")],
    tasks: Annotated[str, typer.Option(help="Tasks, separated by commas: exact-match, loss; classification.")],
    data: Annotated[str, typer.Option(help="File of rows (.jsonl, .json, .parquet) or a data set of the hub.")],
    limit: Annotated[int | None, typer.Option(help="Score the first so many rows.")] = None,
    output_dir: Annotated[str | None, typer.Option(help="Where to write scores.json and a record for each item.")] = None,
    base: Annotated[str | None, typer.Option(help="The adapter's base model, if it has moved.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    dataset_field: Annotated[str | None, typer.Option(help="Question's and answer's field: query,response.")] = None,
    dataset_format: Annotated[str | None, typer.Option(help="How rows are read; default: as in training.")] = None,
    prompt_template: Annotated[str | None, typer.Option(help="With {instruction} in it; default: the adapter's own.")] = None,
    dataset_split: Annotated[str, typer.Option(help="Split of a data set of the hub.")] = "test",
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at a time.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
) -> None:
    """Score a model or an adapter."""
    import json as json_module

    import bonetune
    from bonetune_cli.console import out, progress, quiet_libraries

    quiet_libraries()
    with progress() as bars:
        wanted = [task.strip() for task in tasks.split(",") if task.strip()]
        lines = {task: bars.add_task(task, total=None, note="", visible=False) for task in wanted}
        results = bonetune.evaluate(
            model,
            wanted,
            data=data,
            limit=limit,
            output_dir=output_dir,
            base=base,
            dtype=dtype,
            dataset_field=dataset_field.split(",") if dataset_field else None,
            dataset_format=dataset_format,
            prompt_template=prompt_template,
            dataset_split=dataset_split,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            trust_remote_code=trust_remote_code,
            on_items=lambda task, done, total: bars.update(lines[task], completed=done, total=total, visible=True),
        )
    if json:
        out.print_json(json_module.dumps([result.summary() for result in results]))
        return
    for result in results:
        interval = f"  95% [{result.interval[0]:.3f}, {result.interval[1]:.3f}]" if result.interval else ""
        more = "".join(f"  {name} {value:.4f}" for name, value in result.metrics.items())
        out.print(f"{result.task}: {result.score:.4f}{interval}{more}  ({result.items} items)")
