"""`bonetune pull`."""

from typing import Annotated

import typer


def pull(
    repo: Annotated[str, typer.Argument(help="On the hub: owner/name.", metavar="REPO")],
    folder: Annotated[str, typer.Argument(help="Folder to write.", metavar="FOLDER")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the artifact that FOLDER holds; its other files stay.")
    ] = False,
    include_run: Annotated[
        bool, typer.Option("--include-run", help="Also the run's settings, metrics, prompts and samples, if they are there.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print what was fetched as JSON.")] = False,
) -> None:
    """Fetch an adapter, a model or GGUF files from the Hugging Face hub: nothing that can run, whole or not at all."""
    import json as json_module
    from dataclasses import asdict

    import bonetune
    from bonetune_cli.console import console, out, quiet_libraries

    quiet_libraries()
    with console.status("downloading"):
        result = bonetune.pull(repo, folder, revision=revision, overwrite=overwrite, include_run=include_run)
    if json:
        out.print_json(json_module.dumps(asdict(result)))
        return
    out.print(f"{result.folder} ({result.kind}, commit {result.commit}): {len(result.files)} files")
    if result.left_out:
        out.print(f"  left out: {', '.join(result.left_out)}")
    said = {None: "it has no certificate", True: "its certificate holds", False: "its certificate does NOT hold"}[result.holds]
    out.print(f"  {said}; {len(result.certified)} files have the hashes that it tells")
