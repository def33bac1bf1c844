import signal
import threading

import pytest

from bonetune.training.signals import termination


@pytest.fixture
def obeyed():
    """The SIGTERMs that reach whoever handled them before."""
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    yield received
    signal.signal(signal.SIGTERM, before)


def test_the_first_is_noted_and_the_second_obeyed(obeyed):
    with termination() as ending:
        assert not ending.requested
        signal.raise_signal(signal.SIGTERM)
        assert ending.requested
        assert obeyed == []
        signal.raise_signal(signal.SIGTERM)
        assert obeyed == [signal.SIGTERM]


@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_everything_is_as_it_was(obeyed, fails):
    def block():
        with termination() as ending:
            if fails:
                raise RuntimeError
        return ending

    if fails:
        with pytest.raises(RuntimeError):
            block()
    else:
        assert not block().requested
    signal.raise_signal(signal.SIGTERM)
    assert obeyed == [signal.SIGTERM]


def test_two_runs_do_not_know_of_each_other(obeyed):
    with termination() as first:
        signal.raise_signal(signal.SIGTERM)
    with termination() as second:
        assert first.requested
        assert not second.requested
        signal.raise_signal(signal.SIGTERM)
    assert second.requested
    assert obeyed == []


def test_a_thread_changes_nothing(obeyed):
    handler = signal.getsignal(signal.SIGTERM)
    found = []

    def run():
        with termination() as ending:
            found.append((signal.getsignal(signal.SIGTERM), ending.requested))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [(handler, False)]
