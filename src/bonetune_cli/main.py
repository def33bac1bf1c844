"""`bonetune VERB`."""

import os
import sys

import typer

from bonetune_cli import chat, compare, convert, demo, env, estimate, evaluate, merge, pull, push, tokenize, train
from bonetune_cli.allocator import start_again_with_settings

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
app.command("compare")(compare.compare)
app.command("chat")(chat.chat)
app.command("merge")(merge.merge)
app.command("convert")(convert.convert)
app.command("push")(push.push)
app.command("pull")(pull.pull)
app.command("tokenize")(tokenize.tokenize)
app.command("estimate")(estimate.estimate)
app.command("env")(env.env)


# verbs that compute for long on a CPU
HEAVY = ("train", "demo", "estimate", "compare")


def run() -> None:
    """The process `bonetune`: `main`, with the allocator set for training where that matters."""
    if len(sys.argv) > 1 and sys.argv[1] in HEAVY:
        start_again_with_settings()
    main()


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
        if code == 1 or os.environ.get("LOCAL_RANK", "0") == "0":  # the other processes have the same to say
            print(f"bonetune: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
        sys.exit(code)


def _exit_code(error: Exception) -> int | None:
    """2 for what the user can mend, 1 for a run that failed on its way, 143 for one that was asked to end, None for a defect.

    143 is what the shell reports of any process that SIGTERM ends; a defect keeps its traceback.
    """
    if "bonetune" not in sys.modules:
        return None
    from peft.utils.error import NoMatchingPeftModuleError

    from bonetune.errors import BonetuneError, RunError, Terminated

    if isinstance(error, Terminated):
        return 143
    if isinstance(error, RunError):
        return 1
    return 2 if isinstance(error, BonetuneError | NoMatchingPeftModuleError | PermissionError) else None
