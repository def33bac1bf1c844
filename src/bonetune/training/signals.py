"""SIGTERM as a wish: the run ends after the step it is in, with a checkpoint."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Termination:
    """Whether the process has been asked to end."""

    requested = False


@contextmanager
def termination() -> Iterator[Termination]:
    """While the block runs, the first SIGTERM is noted instead of obeyed; a second one ends the process as always.

    Only a main thread can receive signals; elsewhere nothing changes.
    """
    state = Termination()
    if threading.current_thread() is not threading.main_thread():
        yield state
        return

    def note(number: int, frame: FrameType | None) -> None:
        state.requested = True
        signal.signal(signal.SIGTERM, before)

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield state
    finally:
        signal.signal(signal.SIGTERM, before)
