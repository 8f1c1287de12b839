"""The errors that can end a command, and exit codes that say whether a restart is worth it."""

import errno
from enum import IntEnum
from importlib.util import find_spec

from app.containers import how_to_get_permission


class ExitCode(IntEnum):
    """Exit codes of every command. Only BUG and NETWORK are worth an automatic restart.

    RANK_LOST is between the processes of a training: their launcher ends with another.
    """

    DONE = 0
    BUG = 1
    USER = 2
    NOT_FINITE = 3
    EXHAUSTED = 4
    NETWORK = 5
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


class UserError(AppError):
    """Settings, files or data that cannot work."""

    exit_code = ExitCode.USER


class NotFiniteError(AppError):
    """The loss or the gradient norm is no longer a number."""

    exit_code = ExitCode.NOT_FINITE


class ExhaustedError(AppError):
    """Out of memory or disk."""

    exit_code = ExitCode.EXHAUSTED


class NetworkError(AppError):
    """The hub or the network failed; the same command may work later."""

    exit_code = ExitCode.NETWORK


class RankLostError(AppError):
    """Another process of the training has died or hangs: not this one's fault."""

    exit_code = ExitCode.RANK_LOST


class Stopped(Exception):
    """A signal asked the program to stop, and everything worth keeping is kept."""

    def __init__(self, exit_code: ExitCode, kept: str) -> None:
        super().__init__(kept)
        self.exit_code = exit_code


class ExitWithCode(Exception):
    """The command has ended with this code, and somebody else has said why."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


# The words of torch, CUDA and cuBLAS for it.
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "Storage size calculation overflowed",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


# Packages that are installed under another name than they are imported by.
_DISTRIBUTIONS = {
    "dotenv": "python-dotenv",
    "tiktoken_ext": "tiktoken",
    "vl_convert": "vl-convert-python",
    "yaml": "pyyaml",
}


def translate_error(error: Exception) -> AppError | None:
    """Return the error that explains a failure of the machine to the user; None if it is a bug."""
    if isinstance(error, OSError):
        return _from_os_error(error)
    if isinstance(error, ModuleNotFoundError):
        return _missing_package((error.name or "").partition(".")[0])
    # torch's own types and words, without importing it.
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(words in str(error) for words in _OUT_OF_MEMORY)
    ):
        return _out_of_memory(str(error).partition("\n")[0])
    return None


def _missing_package(name: str) -> UserError | None:
    """Return what to install; None for a part of Python, or of a package that is there."""
    if not name or name.startswith("_") or find_spec(name):
        return None
    distribution = _DISTRIBUTIONS.get(name, name.replace("_", "-"))
    fix = f"pip install {distribution}"
    if name == "torch":
        fix = "install it as README.md says: there are builds for CPUs and for GPUs"
    return UserError(f"this needs the Python package {distribution}, which is not installed", fix)


def _out_of_memory(details: str) -> ExhaustedError:
    return ExhaustedError(
        f"out of memory{f': {details}' if details else ''}",
        "use a smaller model or TRAIN_MICRO_BATCH_SIZE, or a machine with more memory",
    )


def _from_os_error(error: OSError) -> AppError | None:
    place = f" {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ExhaustedError(
            f"the disk is full: cannot write{place}",
            "free space, or set DATA_DIR to a larger disk; then run the same command again",
        )
    if error.errno == errno.EFBIG:
        return ExhaustedError(
            f"this file is too large for the disk or for ulimit -f:{place}",
            "set DATA_DIR to another disk, or lower PREPARE_SHARD_SIZE",
        )
    if error.errno == errno.ENOMEM:
        return _out_of_memory(str(error))
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(
            f"no permission to write or read{place} ({error.strerror})",
            how_to_get_permission(str(error.filename or ""), read_only=error.errno == errno.EROFS),
        )
    if error.errno in (
        errno.ENOTDIR,
        errno.EEXIST,
        errno.EISDIR,
        errno.ENAMETOOLONG,
        errno.ELOOP,
    ):
        return UserError(f"{error.strerror}:{place}", "name another place, or move that away")
    return None
