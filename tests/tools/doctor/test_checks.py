import errno
import os
import threading
from collections.abc import Iterator
from functools import partial

import pytest

from app.errors import ExitCode, ExitWithCode, Stopped, UserError
from app.tools.doctor.checks import Finding, graded, run_check, run_check_within
from app.tools.doctor.doctor import format_row


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
def test_an_error_in_a_check_becomes_its_last_finding(
    error: Exception, found: str, fix: str
) -> None:
    first, last = run_check("disk", lambda: raising(error), "do this")
    assert first == Finding("disk", "pass", "there")
    assert (last.check, last.status) == ("disk", "fail")
    assert found in last.found
    assert fix in last.fix
    assert format_row(last).count("\n") == 1


@pytest.mark.parametrize("error", (Stopped(ExitCode.SIGTERM, "by SIGTERM"), ExitWithCode(3)))
def test_a_stop_is_not_a_finding(error: Exception) -> None:
    with pytest.raises(type(error)):
        list(run_check("disk", lambda: raising(error)))


def test_a_check_that_hangs_is_abandoned() -> None:
    ended = threading.Event()

    def hanging() -> Iterator[Finding]:
        yield Finding("disk", "pass", "there")
        ended.wait()

    first, last = run_check_within(0.1, "disk", hanging)
    ended.set()
    assert first.status == "pass"
    assert (last.check, last.status) == ("disk", "fail")
    assert "has not ended after 0.1 s" in last.found
    slow = partial(raising, UserError("no shards", "prepare them"))
    assert [row.status for row in run_check_within(None, "disk", slow)] == ["pass", "fail"]


@pytest.mark.parametrize("width", (60, 80, 120))
def test_a_row_fits_the_terminal_and_keeps_every_word(width: int) -> None:
    words = " ".join(f"word{number}" for number in range(40))
    finding = Finding("shared memory", "warn", words, words)
    shown = format_row(finding, width)
    assert max(map(len, shown.splitlines())) <= width
    assert " ".join(shown.split()) == f"warn shared memory {words} fix: {words}"
    assert (
        format_row(finding, width, colored=True).replace("\x1b[33m", "").replace("\x1b[0m", "")
        == shown
    )


@pytest.mark.parametrize(
    ("free", "status", "fix"),
    ((0, "fail", "buy a disk"), (5, "warn", "free 5"), (9, "warn", "free more"), (20, "pass", "")),
)
def test_the_first_grade_that_applies_counts(free: int, status: str, fix: str) -> None:
    finding = graded(
        "disk",
        f"{free} free",
        ("fail", free < 5, "buy a disk"),
        ("warn", free < 8 and "some", f"free {free}"),
        ("warn", free < 10, "free more"),
    )
    assert finding == Finding("disk", status, f"{free} free", fix)  # type: ignore[arg-type]
