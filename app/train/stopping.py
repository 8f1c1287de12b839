"""Signals: a run that is to stop saves a checkpoint first."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from app.errors import ExitCode
from app.signals import exit_code_of, exit_now, on_stop_signals, print_in_handler


class Interrupted(Exception):
    """A stop request interrupted evaluation or sampling."""


@dataclass
class StopRequest:
    """The request to stop, if a signal has come.

    Attributes:
        exit_code: the signal's exit code; None if none has come
        has_progress: True once a step is complete. Before that, a signal ends the process at
            once: there is nothing to save, and compiling may take minutes
        quiet: print nothing, because another process on this machine does
    """

    exit_code: ExitCode | None = None
    has_progress: bool = False
    quiet: bool = False

    @property
    def requested(self) -> bool:
        """Return True if a signal has come."""
        return self.exit_code is not None

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.requested:
            raise Interrupted

    def _request(self, number: int) -> None:
        if not self.has_progress:
            self._print("stopped: no new step to save; the same command continues")
            exit_now(number)
        self.exit_code = exit_code_of(number)
        self._print("stopping: saving a checkpoint first; a second signal quits immediately")

    def _print(self, line: str) -> None:
        if not self.quiet:
            print_in_handler(line)


@contextmanager
def stop_on_signals(*, quiet: bool = False) -> Iterator[StopRequest]:
    """Turn SIGINT, SIGTERM and SIGHUP (a lost connection) into a request within the block."""
    stop = StopRequest(quiet=quiet)
    with on_stop_signals(stop._request):
        yield stop
