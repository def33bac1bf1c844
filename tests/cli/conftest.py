import sys

import pytest

from bonetune_cli.main import main


@pytest.fixture
def run(monkeypatch, capfd):
    """Call the command line in this process: (standard output, standard error), after checking the exit code."""

    def call(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["bonetune", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capfd.readouterr()
        assert (stop.value.code or 0) == code, captured
        return captured

    return call
