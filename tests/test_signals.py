import signal
import threading

import pytest

from app.signals import on_stop_signals

LIMIT_SECONDS = 20.0


class Asked(Exception):
    pass


def raise_asked(number: int) -> None:
    assert number == signal.SIGTERM
    raise Asked


def test_signal_that_does_not_wake_the_main_thread_is_sent_again() -> None:
    """Python's handlers wait for the main thread, and the main thread waits for a lock."""
    lock = threading.Lock()
    lock.acquire()
    other = threading.Timer(0.1, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGTERM))
    other.start()
    with pytest.raises(Asked), on_stop_signals(raise_asked):
        lock.acquire(timeout=LIMIT_SECONDS)


def test_block_that_does_not_end_is_told_of() -> None:
    late: list[int] = []
    told = threading.Event()

    def too_late(number: int) -> None:
        late.append(number)
        told.set()

    with on_stop_signals(lambda _: None, within_seconds=0.1, too_late=too_late):
        signal.raise_signal(signal.SIGTERM)
        assert told.wait(LIMIT_SECONDS)
    assert late == [signal.SIGTERM]


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with on_stop_signals(lambda _: None):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.set_wakeup_fd(-1) == -1
