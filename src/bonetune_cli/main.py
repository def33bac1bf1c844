"""`bonetune VERB`."""

import os
import sys
from collections.abc import Callable

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
    """Run the command line. Wrong input is one line on standard error and exit code 2."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' own bars; read when tqdm is imported
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        message = _one_line(error)
        if message is None:
            raise
        print(f"bonetune: {message}", file=sys.stderr)  # noqa: T201
        sys.exit(2)


def _one_line(error: Exception) -> str | None:
    """The message of an error that the user can mend; None for any other."""
    if "bonetune" not in sys.modules:
        return None
    from peft.utils.error import NoMatchingPeftModuleError

    from bonetune.errors import BonetuneError

    known: tuple[type[Exception], ...] = (BonetuneError, NoMatchingPeftModuleError)
    is_filesystem: Callable[[Exception], bool] = lambda e: isinstance(e, PermissionError | IsADirectoryError)  # noqa: E731
    return " ".join(str(error).split()) if isinstance(error, known) or is_filesystem(error) else None
