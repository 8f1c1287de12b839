import signal
import threading

import pytest

from app.signals import RESEND_SECONDS, on_stop_signals

LIMIT_SECONDS = 300.0


class Requested(Exception):
    pass


def raise_requested(number: int) -> None:
    assert number == signal.SIGTERM
    raise Requested


def test_signal_that_does_not_wake_the_main_thread_is_sent_again() -> None:
    """Python runs handlers in the main thread, which is waiting for a lock."""
    lock = threading.Lock()
    lock.acquire()
    other = threading.Timer(0.1, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGTERM))

    def wait() -> None:
        with on_stop_signals(raise_requested):
            other.start()
            lock.acquire(timeout=LIMIT_SECONDS)

    with pytest.raises(Requested):
        wait()


def test_other_signals_come_once() -> None:
    received: list[int] = []
    second = threading.Event()
    earlier = signal.signal(signal.SIGUSR1, lambda number, _: received.append(number))
    try:
        with on_stop_signals(raise_requested):
            signal.raise_signal(signal.SIGUSR1)
            # As long as two requests to stop would take to be sent again.
            second.wait(2.5 * RESEND_SECONDS)
    finally:
        signal.signal(signal.SIGUSR1, earlier)
    assert received == [signal.SIGUSR1]


def test_block_that_takes_too_long_is_timed_out() -> None:
    timed_out: list[int] = []
    has_timed_out = threading.Event()

    def time_out(number: int) -> None:
        timed_out.append(number)
        has_timed_out.set()

    with on_stop_signals(lambda _: None, limit_seconds=0.1, time_out=time_out):
        signal.raise_signal(signal.SIGTERM)
        assert has_timed_out.wait(LIMIT_SECONDS)
    assert timed_out == [signal.SIGTERM]


def test_signals_close_together_are_one_request() -> None:
    requests: list[int] = []
    insisted: list[int] = []
    with on_stop_signals(requests.append, insisted.append):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert (requests, insisted) == ([signal.SIGTERM], [])


def test_ignored_signal_stays_ignored() -> None:
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with on_stop_signals(raise_requested):
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, earlier)


def test_handlers_are_restored() -> None:
    earlier = signal.getsignal(signal.SIGTERM)
    with on_stop_signals(lambda _: None):
        assert signal.getsignal(signal.SIGTERM) is not earlier
    assert signal.getsignal(signal.SIGTERM) is earlier
    assert signal.set_wakeup_fd(-1) == -1
