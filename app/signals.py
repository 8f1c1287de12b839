"""Signals that stop the program: the first one requests it, a later one insists."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from app.errors import ExitCode

# SIGHUP: the terminal was closed, or its connection lost.
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Signals this close together are one request: a container may get one Ctrl-C in two ways.
SAME_REQUEST_SECONDS = 2.0
RESEND_SECONDS = 0.5


def exit_code_of(number: int) -> ExitCode:
    """Return the exit code of a program that this signal stopped."""
    return ExitCode.SIGINT if number == signal.SIGINT else ExitCode.SIGTERM


def exit_now(number: int) -> None:
    """End the process at once, with the exit code of this signal."""
    os._exit(exit_code_of(number))


@contextmanager
def on_stop_signals(
    request: Callable[[int], None],
    insist: Callable[[int], None] = exit_now,
    *,
    limit_seconds: float = threading.TIMEOUT_MAX,
    time_out: Callable[[int], None] = exit_now,
) -> Iterator[None]:
    """Handle SIGINT, SIGTERM and SIGHUP within the block.

    A signal that nohup or a shell has set to be ignored stays ignored.

    Args:
        request: called with the first signal's number, in its handler.
        insist: called in the handler with those that come more than SAME_REQUEST_SECONDS later.
        limit_seconds: how long the block may run after the first signal.
        time_out: called with the first signal's number after that time, in another thread.
    """
    requested_at: float | None = None
    main_thread = threading.get_ident()
    block_ended = threading.Event()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def handle(number: int, _frame: FrameType | None) -> None:
        nonlocal requested_at
        if requested_at is None:
            requested_at = time.monotonic()
            request(number)
        elif time.monotonic() - requested_at > SAME_REQUEST_SECONDS:
            insist(number)

    def watch() -> None:
        # Handlers of other signals, which a script may have, write here as well.
        while (numbers := os.read(reader, 1)) and numbers[0] not in _STOP_SIGNALS:
            pass
        if not numbers:
            return
        # Python runs handlers in the main thread only, and a signal just before that thread waits
        # for a lock does not interrupt the wait. Another one does.
        while requested_at is None and not block_ended.wait(RESEND_SECONDS):
            if requested_at is None:
                signal.pthread_kill(main_thread, numbers[0])
        if not block_ended.wait(limit_seconds):
            time_out(numbers[0])

    watcher = threading.Thread(target=watch, name="signals", daemon=True)
    watcher.start()
    earlier_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    earlier_handlers = {
        number: signal.signal(number, handle)
        for number in _STOP_SIGNALS
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in earlier_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(earlier_fd)
        block_ended.set()
        os.close(writer)
        watcher.join()
        os.close(reader)


def print_in_handler(line: str) -> None:
    """Print to standard error from a signal handler, if it is still there.

    A handler may interrupt a print, within which another print is an error.
    """
    with suppress(OSError):
        os.write(2, f"{erase_echo()}{line}\n".encode())


def erase_echo() -> str:
    """Return what erases the `^C` that a terminal shows, and a bar around it; "" without one."""
    return "\r\x1b[J" if os.isatty(2) else ""
