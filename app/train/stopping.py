"""Signals: a run that is asked to stop first keeps what it has."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from app.errors import ExitCode
from app.signals import exit_code_of, exit_now, on_stop_signals, print_in_handler


class Interrupted(Exception):
    """Work was left because of a request to stop."""


@dataclass
class StopRequest:
    """A signal's request to stop, if one has come.

    Attributes:
        exit_code: that of the signal; None if none has come.
        has_progress: until a step is done there is nothing, and a signal ends the process at
            once: a compiler may run for minutes before.
    """

    exit_code: ExitCode | None = None
    has_progress: bool = False

    @property
    def requested(self) -> bool:
        """Return True if a signal has come."""
        return self.exit_code is not None

    def _ask(self, number: int) -> None:
        if not self.has_progress:
            print_in_handler("stopped: no new step to save; the same command continues")
            exit_now(number)
        self.exit_code = exit_code_of(number)
        print_in_handler("stopping: saving a checkpoint first; a second signal leaves at once")

    def interrupt(self) -> None:
        """Raise Interrupted if there is a request: for between the parts of longer work."""
        if self.requested:
            raise Interrupted


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn SIGINT, SIGTERM and SIGHUP (a lost connection) into a request, within the block."""
    request = StopRequest()
    with on_stop_signals(request._ask):
        yield request
