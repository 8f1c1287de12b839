"""How a command ends: the exit code and the message of each kind of failure."""

import errno
import subprocess
import sys

import pytest

from app.cli.process import run_and_report
from app.errors import (
    ExhaustedError,
    ExitCode,
    ExitWithCode,
    NetworkError,
    NotFiniteError,
    RankLostError,
    Stopped,
    UserError,
)
from tests.newcomer import REPOSITORY


@pytest.mark.parametrize(
    ("error", "code", "message"),
    (
        (UserError("x is wrong", "correct it"), 2, "error: x is wrong\n  fix: correct it\n"),
        (
            NotFiniteError("the loss is nan", "lower it"),
            3,
            "error: the loss is nan\n  fix: lower it\n",
        ),
        (ExhaustedError("too large", "use less"), 4, "error: too large\n  fix: use less\n"),
        (NetworkError("no answer", "try later"), 5, "error: no answer\n  fix: try later\n"),
        (RankLostError("rank 1 is lost", "see it"), 75, "error: rank 1 is lost\n  fix: see it\n"),
        (Stopped(ExitCode.SIGTERM, "all is saved"), 143, "stopped: all is saved\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
        (ExitWithCode(7), 7, ""),
        (SystemExit(), 0, ""),
    ),
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_each_expected_end_has_its_exit_code_and_message(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    assert run_and_report(fail) == code
    assert capsys.readouterr() == ("", message)


def test_a_full_disk_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "data/x")

    assert run_and_report(fail) == ExitCode.EXHAUSTED
    assert capsys.readouterr().err.startswith("error: the disk is full: cannot write data/x\n")


def test_a_bug_passes() -> None:
    def fail() -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        run_and_report(fail)


def test_success_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_and_report(lambda: print("done")) == 0
    assert capsys.readouterr() == ("done\n", "")


def test_another_program_can_give_the_arguments() -> None:
    code = "from app.__main__ import main; main(['nonsense'])"
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: 'nonsense' is not a command")
