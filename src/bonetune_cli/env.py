"""`bonetune env`."""

from typing import Annotated

import typer


def env(json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """Show versions and hardware, for a bug report."""
    import json as json_module

    import bonetune
    from bonetune_cli.console import out, quiet_libraries

    quiet_libraries()
    facts = bonetune.environment()
    if json:
        out.print_json(json_module.dumps(facts))
        return
    for name, value in facts.items():
        out.print(f"{name:14} {value}")
