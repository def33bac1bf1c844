"""The exceptions a user of bonetune meets.

All of them derive from `BonetuneError`, so that one `except` clause (the command line's, for instance) tells wrong input
from a defect in this package. Messages are one sentence or two: the thing, its value, the remedy.
"""


class BonetuneError(Exception):
    """Base class of everything bonetune raises on purpose."""


class InputError(BonetuneError, ValueError):
    """A setting, a file or a data set that cannot be used as it is."""


class SpecError(InputError):
    """A shard size or variant that does not fit a weight's shape."""


class AdapterFileError(InputError):
    """An adapter file whose tensors do not fit the model or its own configuration."""


class TargetError(InputError, TypeError):
    """A module that cannot be adapted."""


class RunError(BonetuneError):
    """A run or a merge that went wrong although its input was in order. The command line exits with 1."""


class DivergedError(RunError):
    """A run whose loss, gradient or weights are no longer finite numbers."""


class Terminated(RunError):  # noqa: N818  (it is no error that a run ends when it is asked to)
    """A run that was asked to end by SIGTERM, and left a checkpoint. The command line exits with 143."""


def first_line(error: Exception) -> str:
    """What an error says first, or what it is."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
