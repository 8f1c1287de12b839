"""Signals that ask the program to stop: the first is a request, a later one insists."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from app.errors import ExitCode

# A lost terminal is one, too.
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Signals this close are one request: Ctrl-C reaches a container on two ways, say.
SAME_REQUEST_SECONDS = 2.0
_NUDGE_SECONDS = 0.5


def leave(number: int) -> None:
    """End the process at once, with the code of this signal."""
    os._exit(exit_code_of(number))


@contextmanager
def on_stop_signals(
    ask: Callable[[int], None],
    insist: Callable[[int], None] = leave,
    *,
    within_seconds: float = threading.TIMEOUT_MAX,
    too_late: Callable[[int], None] = leave,
) -> Iterator[None]:
    """Answer SIGINT, SIGTERM and SIGHUP within the block.

    What nohup or a shell has set to be ignored stays ignored.

    Args:
        ask: called with the number of the first one, in its handler.
        insist: called with those that come later than a moment after it.
        within_seconds: how long the block may last after the first one.
        too_late: called with its number in another thread when that time is over.
    """
    asked_at: float | None = None
    main = threading.get_ident()
    left = threading.Event()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def handle(number: int, _frame: FrameType | None) -> None:
        nonlocal asked_at
        if asked_at is None:
            asked_at = time.monotonic()
            ask(number)
        elif time.monotonic() - asked_at > SAME_REQUEST_SECONDS:
            insist(number)

    def watch() -> None:
        if not (numbers := os.read(reading, 1)):
            return
        # Python calls no handler while its main thread waits for a lock, which goes on if the
        # signal comes in the moment before: once more, then.
        while asked_at is None and not left.wait(_NUDGE_SECONDS):
            if asked_at is None:
                signal.pthread_kill(main, numbers[0])
        if not left.wait(within_seconds):
            too_late(numbers[0])

    watcher = threading.Thread(target=watch, name="signals", daemon=True)
    watcher.start()
    before_fd = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    before = {
        one: signal.signal(one, handle)
        for one in _STOPPING
        if signal.getsignal(one) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
        signal.set_wakeup_fd(before_fd)
        left.set()
        os.close(writing)
        watcher.join()
        os.close(reading)


def exit_code_of(number: int) -> ExitCode:
    """With which code a signal ends the program."""
    return ExitCode.SIGINT if number == signal.SIGINT else ExitCode.SIGTERM


def say(line: str) -> None:
    """Write to standard error from a signal's handler, if it is still there.

    A handler may run in the middle of a print, where another print is an error.
    """
    with suppress(OSError):
        os.write(2, f"{line}\n".encode())
