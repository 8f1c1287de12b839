"""Exit codes, and the exceptions that end a command with one of them."""

from enum import IntEnum
from typing import Self


class ExitCode(IntEnum):
    """Exit codes. A restart may help after NETWORK, and a few times after BUG or a kill (137)."""

    DONE = 0
    BUG = 1
    USER = 2
    NOT_FINITE = 3
    EXHAUSTED = 4
    NETWORK = 5
    # Between a training process and its launcher, which exits with another code.
    RANK_LOST = 75
    SIGINT = 130
    SIGPIPE = 141
    SIGTERM = 143


class AppError(Exception):
    """An expected failure: `problem` is what is wrong, `fix` is what to do about it."""

    exit_code = ExitCode.BUG

    def __init__(self, problem: str, fix: str) -> None:
        super().__init__(f"{problem}\n  fix: {fix}")
        self.problem = problem
        self.fix = fix

    def __reduce__(self) -> tuple[type[Self], tuple[str, str]]:
        """Support pickling, so that another process can raise the error again."""
        return type(self), (self.problem, self.fix)


class UserError(AppError):
    """The settings, files or data cannot work."""

    exit_code = ExitCode.USER


class NotFiniteError(AppError):
    """The loss or the gradient norm is NaN or infinite."""

    exit_code = ExitCode.NOT_FINITE


class ExhaustedError(AppError):
    """Memory or disk space has run out."""

    exit_code = ExitCode.EXHAUSTED


class NetworkError(AppError):
    """The hub or the network failed; the same command may work later."""

    exit_code = ExitCode.NETWORK


class RankLostError(AppError):
    """Another training process has died or hangs; this one is not at fault."""

    exit_code = ExitCode.RANK_LOST


class Stopped(Exception):
    """A signal stopped the program after it saved what is needed to continue."""

    def __init__(self, exit_code: ExitCode, kept: str) -> None:
        super().__init__(kept)
        self.exit_code = exit_code


class ExitWithCode(Exception):
    """Exit with this code; another process has already printed the reason."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code
