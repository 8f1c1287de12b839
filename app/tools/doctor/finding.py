"""The findings of a check, and their form for a person."""

import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Literal

from app.errors import AppError, ExitWithCode, Stopped
from app.failures import translate_error

Status = Literal["pass", "warn", "fail", "skip"]
# Colours of terminals (ECMA-48, 8.3.117).
_COLOURS = {"pass": "32", "warn": "33", "fail": "1;31", "skip": "2"}
_COLUMN = 13
_LEAST_WIDTH = 60
UNCOMPILED = "set TRAIN_COMPILE=false, which trains without the compiler, slower"
UNEXPECTED = "nobody has expected this: please report it"


@dataclass(frozen=True)
class Finding:
    """One row of the table: `found` is what there is, `fix` is what to do about it."""

    check: str
    status: Status
    found: str
    fix: str = ""

    def lines(self, width: int = sys.maxsize, *, coloured: bool = False) -> str:
        """The row as text, in lines of at most `width`; coloured for a terminal."""
        head = f"{self.status}  {self.check:<{_COLUMN}} "
        indent, width = " " * len(head), max(width, _LEAST_WIDTH)
        text = textwrap.fill(self.found, width, initial_indent=head, subsequent_indent=indent)
        if self.fix:
            fix = f"fix: {self.fix}"
            text += "\n" + textwrap.fill(
                fix, width, initial_indent=indent, subsequent_indent=indent
            )
        if not coloured:
            return text
        return f"\x1b[{_COLOURS[self.status]}m{text[:4]}\x1b[0m{text[4:]}"


def failure(check: str, error: Exception, fix: str = UNEXPECTED) -> Finding:
    """The row of a check that raised an error; `fix` is for one that says of itself none."""
    expected = error if isinstance(error, AppError) else translate_error(error)
    if expected is not None:
        return Finding(check, "fail", expected.problem, expected.fix)
    said = " ".join(str(error).split())[:300]
    return Finding(check, "fail", f"{type(error).__name__}: {said}", fix)


def examined(
    check: str, find: Callable[[], Iterable[Finding]], fix: str = UNEXPECTED
) -> Iterator[Finding]:
    """Yield what a check finds; an error in it is one more row, and the check's last."""
    try:
        yield from find()
    except Exception as error:
        if isinstance(error, Stopped | ExitWithCode):
            raise
        yield failure(check, error, fix)


def examined_within(
    seconds: float | None, check: str, find: Callable[[], Iterable[Finding]]
) -> Iterator[Finding]:
    """Yield what a check finds; what hangs (a disk, a network) is left behind in its thread.

    Args:
        seconds: that the check may go on without a finding; None for as long as it takes.
    """
    found: SimpleQueue[Finding | None] = SimpleQueue()

    def look() -> None:
        try:
            for finding in examined(check, find):
                found.put(finding)
        finally:
            found.put(None)

    Thread(target=look, daemon=True, name=check).start()
    try:
        while finding := found.get(timeout=seconds):
            yield finding
    except Empty:
        fix = "see which disk, network or driver does not answer; if it stays, take another machine"
        yield Finding(check, "fail", f"this has not ended after {seconds:g} s", fix)


def gigabytes(count: float) -> str:
    """Bytes as people count disks and memory: 1_500_000_000 is 1.5 GB."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} KB"


def counted(count: int, one: str, more: str = "") -> str:
    """1 step, 2 steps, 1,000 steps."""
    return f"{count:,} {one if count == 1 else more or one + 's'}"
