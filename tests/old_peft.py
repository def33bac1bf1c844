"""PEFT 0.18.1, the last release with a Bone of its own, in an environment of its own with this one's torch."""

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def run(script, *arguments):
    """Run a script under PEFT 0.18.1; what it said on stderr."""
    return run_under(_environment()[1], script, *arguments)


def run_under(python, script, *arguments):
    """Run a script under some Python; what it said on stderr."""
    # a source tree on this process's path is not for the other's packages
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, "-W", "default", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stderr


@functools.cache
def _environment():
    """The folder, which lasts as long as this process, and the Python in it."""
    import torch

    folder = tempfile.TemporaryDirectory(prefix="peft018-")
    subprocess.run([sys.executable, "-m", "venv", folder.name], check=True)
    python = Path(folder.name) / "bin" / "python"
    requirements = [f"torch=={torch.__version__.partition('+')[0]}", "peft==0.18.1", "transformers==4.57.3", "numpy"]
    for requirement in (requirements[:1], requirements):
        subprocess.run([python, "-m", "pip", "install", "--quiet", *requirement], check=True)
    return folder, python
