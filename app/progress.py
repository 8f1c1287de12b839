"""Progress: a bar on a terminal, otherwise a line now and then."""

import sys
import time
from collections.abc import MutableMapping
from threading import RLock
from typing import TYPE_CHECKING, Any, NoReturn, Self

from tqdm import tqdm

if TYPE_CHECKING:
    _Tqdm = tqdm[NoReturn]
else:
    _Tqdm = tqdm


class Bar(_Tqdm):
    """A bar on standard error that stays on the screen only if it is complete.

    All it draws is written at once and leaves the cursor at its beginning: wherever a signal comes,
    the `^C` that a terminal shows, and the bar, can be erased from there.

    Attributes:
        below: a second line
    """

    # tqdm's own lock is made of semaphores that outlive the process.
    _lock = RLock()
    below = ""

    @property
    def format_dict(self) -> MutableMapping[str, Any]:
        """Return what the bar is drawn from, two columns narrower.

        A `^C` that a terminal shows after a full line would move all that follows down by one.
        """
        drawn = super().format_dict
        return {**drawn, "ncols": drawn["ncols"] and max(1, drawn["ncols"] - len("^C"))}

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Draw the bar, or this text in its place."""
        below = f"\n{self.below}\x1b[A" if self.below and msg is None else ""
        self.fp.write(f"\r\x1b[J{self if msg is None else msg}{below}\r")
        self.fp.flush()

    def clear(self, nolock: bool = False) -> None:
        """Erase the bar until it is drawn again."""
        if not self.disable:
            with self._lock:
                self.display("")

    def close(self) -> None:
        """Close the bar, and erase it if it is not complete."""
        self.below, self.leave = "", self.total is not None and self.n >= self.total
        super().close()


class TokenProgress:
    """Shows the number of tokens, tokens/s and the time left.

    An unknown total is estimated from the share of the source that is read.

    Args:
        total: tokens at the end; None if unknown.
        done: tokens of earlier processes.
        seconds_between_lines: shortest time between two lines if there is no terminal.
    """

    def __init__(
        self, total: int | None, *, done: int = 0, seconds_between_lines: float = 10.0
    ) -> None:
        self._total, self._done_before = total, done
        self._seconds_between_lines = seconds_between_lines
        self._started = self._last_line = time.perf_counter()
        self._bar = Bar(total=total, initial=done, unit=" tokens", unit_scale=True, disable=None)

    def show(self, tokens: int, fraction: float | None) -> None:
        """Show the number of tokens, and the share of the source that is read (None: unknown)."""
        total = self._total or (round(tokens / fraction) if fraction else None)
        if not self._bar.disable:
            self._bar.total = total
            self._bar.update(tokens - self._bar.n)
            return
        now = time.perf_counter()
        if now - self._last_line >= self._seconds_between_lines:
            self._last_line = now
            rate = (tokens - self._done_before) / (now - self._started)
            print(progress_line(tokens, total, rate), flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._bar.close()
        sys.stderr.flush()


def progress_line(tokens: int, total: int | None, rate: float) -> str:
    """Return "1,000,000 of 4,000,000 tokens (25%), 500,000 tokens/s, 00:06 left", for example."""
    line = f"{tokens:,} tokens, {rate:,.0f} tokens/s"
    if total is None or not rate:
        return line
    left = tqdm.format_interval(max(0.0, (total - tokens) / rate))
    share = f"{tokens:,} of {total:,} tokens ({tokens / total:.0%})"
    return f"{share}, {rate:,.0f} tokens/s, {left} left"


def print_line(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)
