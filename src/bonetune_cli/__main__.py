"""`python -m bonetune_cli`, for launchers that take a module: `accelerate launch -m bonetune_cli train run.yaml`."""

from bonetune_cli.main import run

run()
