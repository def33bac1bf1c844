"""A run that stops in the middle and goes on."""

import pytest

import bonetune


class KilledError(Exception):
    """As if the process had been killed."""


def kill_at(step):
    """An `on_progress` that ends the run after `step`."""

    def kill(progress):
        if progress.step == step:
            raise KilledError

    return kill


def killed_and_resumed(settings, step):
    """Train until `step`, then go on from the last checkpoint."""
    with pytest.raises(KilledError):
        bonetune.train(settings, on_progress=kill_at(step))
    return bonetune.train(settings, resume=True)
