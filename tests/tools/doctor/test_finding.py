import errno
import os
import threading
from collections.abc import Iterator
from functools import partial

import pytest

from app.errors import ExitCode, ExitWithCode, Stopped, UserError
from app.tools.doctor.finding import Finding, examined, examined_within, gigabytes


def raising(error: Exception) -> Iterator[Finding]:
    yield Finding("disk", "pass", "there")
    raise error


@pytest.mark.parametrize(
    ("error", "found", "fix"),
    (
        (UserError("no shards", "prepare them"), "no shards", "prepare them"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x"), "the disk is full", "free space"),
        (ZeroDivisionError("division\nby zero"), "ZeroDivisionError: division by zero", "do this"),
    ),
)
def test_an_error_in_a_check_is_its_last_row(error: Exception, found: str, fix: str) -> None:
    first, last = examined("disk", lambda: raising(error), "do this")
    assert first == Finding("disk", "pass", "there")
    assert (last.check, last.status) == ("disk", "fail")
    assert found in last.found
    assert fix in last.fix
    assert last.lines().count("\n") == 1


@pytest.mark.parametrize("error", (Stopped(ExitCode.SIGTERM, "by SIGTERM"), ExitWithCode(3)))
def test_an_end_of_the_program_is_no_finding(error: Exception) -> None:
    with pytest.raises(type(error)):
        list(examined("disk", lambda: raising(error)))


def test_a_check_that_hangs_is_left_behind() -> None:
    ended = threading.Event()

    def hanging() -> Iterator[Finding]:
        yield Finding("disk", "pass", "there")
        ended.wait()

    first, last = examined_within(0.1, "disk", hanging)
    ended.set()
    assert first.status == "pass"
    assert (last.check, last.status) == ("disk", "fail")
    assert "has not ended after 0.1 s" in last.found
    slow = partial(raising, UserError("no shards", "prepare them"))
    assert [row.status for row in examined_within(None, "disk", slow)] == ["pass", "fail"]


@pytest.mark.parametrize("width", (60, 80, 120))
def test_a_row_fits_the_terminal_and_says_all(width: int) -> None:
    words = " ".join(f"word{number}" for number in range(40))
    finding = Finding("shared memory", "warn", words, words)
    shown = finding.lines(width)
    assert max(map(len, shown.splitlines())) <= width
    assert " ".join(shown.split()) == f"warn shared memory {words} fix: {words}"
    assert (
        finding.lines(width, coloured=True).replace("\x1b[33m", "").replace("\x1b[0m", "") == shown
    )


@pytest.mark.parametrize(
    ("count", "shown"),
    ((0, "0 KB"), (1500, "1.5 KB"), (2e6, "2 MB"), (1.493e9, "1.49 GB"), (3e12, "3 TB")),
)
def test_bytes_are_short(count: float, shown: str) -> None:
    assert gigabytes(count) == shown
