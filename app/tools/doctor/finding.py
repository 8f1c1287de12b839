"""What a check has found, and how a person reads it."""

import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

from app.errors import AppError, Ended, Stopped, expected_failure

Status = Literal["pass", "warn", "fail", "skip"]
# Of terminals (ECMA-48, 8.3.117).
_COLOURS = {"pass": "32", "warn": "33", "fail": "1;31", "skip": "2"}
_COLUMN = 13
_UNEXPECTED = "nobody has expected this: please report it"


@dataclass(frozen=True)
class Finding:
    """One row of the table: `found` is what there is, `fix` is what to do about it."""

    check: str
    status: Status
    found: str
    fix: str = ""

    def lines(self, *, width: int | None = None, coloured: bool = False) -> str:
        """The row as text, in one or more lines.

        Args:
            width: of the terminal; None for lines as long as they are.
            coloured: for a terminal.
        """
        shown = [(f"{self.status}  {self.check:<{_COLUMN}} ", self.found)]
        if self.fix:
            shown.append((" " * (6 + _COLUMN) + " ", f"fix: {self.fix}"))
        indent = " " * (7 + _COLUMN)
        text = "\n".join(
            head + body
            if width is None
            else textwrap.fill(body, max(width, 60), initial_indent=head, subsequent_indent=indent)
            for head, body in shown
        )
        if not coloured:
            return text
        return f"\x1b[{_COLOURS[self.status]}m{text[:4]}\x1b[0m{text[4:]}"


def failure(check: str, error: Exception, fix: str = _UNEXPECTED) -> Finding:
    """The row of a check that raised an error; `fix` is for one that says of itself none."""
    expected = error if isinstance(error, AppError) else expected_failure(error)
    if expected is not None:
        return Finding(check, "fail", expected.problem, expected.fix)
    said = " ".join(str(error).split())[:300]
    return Finding(check, "fail", f"{type(error).__name__}: {said}", fix)


def examined(
    check: str, find: Callable[[], Iterable[Finding]], fix: str = _UNEXPECTED
) -> Iterator[Finding]:
    """Yield what a check finds; an error in it is one more row, and the check's last."""
    told = _Told(check, fix)
    with told:
        yield from find()
    yield from told.rows


class _Told:
    """Turns whatever goes wrong in its block into a row of the table."""

    def __init__(self, check: str, fix: str) -> None:
        self.rows: list[Finding] = []
        self._check, self._fix = check, fix

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _trace: TracebackType | None,
    ) -> bool:
        if not isinstance(error, Exception) or isinstance(error, Stopped | Ended):
            return False
        self.rows.append(failure(self._check, error, self._fix))
        return True


def gigabytes(count: float) -> str:
    """Bytes as people count disks and memory: 1_500_000_000 is 1.5 GB."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} KB"
