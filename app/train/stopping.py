"""Signals: a run that is asked to stop first keeps what it has."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

from app.errors import SAME_REQUEST_SECONDS, ExitCode

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def say(line: bytes) -> None:
    """Write to standard error from a signal's handler, if it is still there.

    A handler may run in the middle of a print, where another print is an error.
    """
    with suppress(OSError):
        os.write(2, line)


class Interrupted(Exception):
    """Work was left because of a request to stop."""


@dataclass
class StopRequest:
    """Whether a signal has asked the program to stop.

    Attributes:
        exit_code: that of the signal; None if none has come.
        something_to_save: until a step is done there is nothing, and a signal ends the process at
            once: a compiler may run for minutes before.
    """

    exit_code: ExitCode | None = None
    something_to_save: bool = False
    _asked_at: float = 0.0

    @property
    def is_asked(self) -> bool:
        """Whether to stop."""
        return self.exit_code is not None

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        code = ExitCode.SIGINT if number == signal.SIGINT else ExitCode.SIGTERM
        if not self.something_to_save:
            say(b"stopped: no new step to save; the same command continues\n")
            os._exit(code)
        if self.exit_code is not None:
            if time.monotonic() - self._asked_at > SAME_REQUEST_SECONDS:
                os._exit(code)
            return
        self.exit_code, self._asked_at = code, time.monotonic()
        say(b"stopping: saving a checkpoint first; a second signal leaves at once\n")

    def interrupt(self) -> None:
        """Raise Interrupted if there is a request: for between the parts of longer work."""
        if self.is_asked:
            raise Interrupted


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn SIGINT, SIGTERM and SIGHUP (a lost connection) into a request, within the block."""
    request = StopRequest()
    before = {
        one: signal.signal(one, request._ask)
        for one in STOPPING
        # What nohup ignores stays ignored.
        if signal.getsignal(one) is not signal.SIG_IGN
    }
    try:
        yield request
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
