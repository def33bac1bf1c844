"""`bonetune push`."""

from typing import Annotated

import typer


def push(
    folder: Annotated[str, typer.Argument(help="Folder of an adapter, a merged model or GGUF files.", metavar="FOLDER")],
    repo: Annotated[str, typer.Argument(help="On the hub: owner/name.", metavar="REPO")],
    private: Annotated[bool, typer.Option("--private", help="Nobody else can see it.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to, created if need be.")] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    base_model_id: Annotated[
        str | None, typer.Option(help="The base model's name on the hub, if the adapter has a path.")
    ] = None,
    include_run: Annotated[
        bool, typer.Option("--include-run", help="Also the run's settings, metrics, prompts and samples, as they are.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print what was uploaded as JSON.")] = False,
) -> None:
    """Upload an adapter, a merged model or GGUF files to the Hugging Face hub."""
    import json as json_module
    from dataclasses import asdict

    import bonetune
    from bonetune_cli.console import console, out, quiet_libraries

    quiet_libraries()
    with console.status("uploading"):
        result = bonetune.push(
            folder,
            repo,
            private=private,
            revision=revision,
            message=message,
            base_model_id=base_model_id,
            include_run=include_run,
        )
    if json:
        out.print_json(json_module.dumps(asdict(result)))
        return
    out.print(f"{result.url}: {len(result.files)} files ({', '.join(result.files)})")
    if result.rewritten:
        out.print(f"  without paths of this machine: {', '.join(result.rewritten)}")
    if result.deleted:
        out.print(f"  deleted, of an earlier push: {', '.join(result.deleted)}")
    if result.left_out:
        out.print(f"  left out: {', '.join(result.left_out)}")
