"""`bonetune VERB`."""

import os
import sys

import typer

from bonetune_cli import demo, env, evaluate, merge, train

app = typer.Typer(
    name="bonetune",
    help="Fine-tune language models with Bone, BAT and MiSS adapters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo.demo)
app.command("train")(train.train)
app.command("eval")(evaluate.evaluate)
app.command("merge")(merge.merge)
app.command("env")(env.env)


def main() -> None:
    """Run the command line. Wrong input is one line on standard error and exit code 2; a run that failed, exit code 1."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' own bars; read when tqdm is imported
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            raise
        print(f"bonetune: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
        sys.exit(code)


def _exit_code(error: Exception) -> int | None:
    """2 for what the user can mend, 1 for a run that failed on its way, None for a defect, which keeps its traceback."""
    if "bonetune" not in sys.modules:
        return None
    from peft.utils.error import NoMatchingPeftModuleError

    from bonetune.errors import BonetuneError, RunError

    if isinstance(error, RunError):
        return 1
    return 2 if isinstance(error, BonetuneError | NoMatchingPeftModuleError | PermissionError) else None
