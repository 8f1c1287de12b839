"""Explanations of the failures that come from the machine, not from this program."""

import errno
from importlib.util import find_spec

from app.containers import how_to_get_permission
from app.errors import AppError, ExhaustedError, UserError

# How torch, CUDA and cuBLAS report that memory has run out, where the exception's type does not.
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "Storage size calculation overflowed",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
# Import name -> distribution, where "_" -> "-" does not lead from one to the other.
_DISTRIBUTIONS = {
    "dotenv": "python-dotenv",
    "tiktoken_ext": "tiktoken",
    "vl_convert": "vl-convert-python",
    "yaml": "pyyaml",
}
# A disk or a file server that breaks, or lacks what every other one can do.
_FILE_SYSTEM_FAILS = (
    *(errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENOTCONN),
    *(errno.ENODEV, errno.ENXIO, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK),
    *(errno.EBUSY, errno.ENOTEMPTY, errno.EXDEV),
)
_UNUSABLE_PATH = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)


def translate_error(error: Exception) -> AppError | None:
    """Return an AppError that explains the failure and its fix; None if `error` is a bug."""
    if isinstance(error, OSError):
        return _os_error(error)
    if isinstance(error, ModuleNotFoundError):
        return _missing_package((error.name or "").partition(".")[0])
    # Recognized by name and message, because importing torch takes seconds.
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(message in str(error) for message in _OUT_OF_MEMORY)
    ):
        return _out_of_memory(str(error).partition("\n")[0])
    return None


def _os_error(error: OSError) -> AppError | None:
    path = f" {error.filename}" if error.filename else ""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return ExhaustedError(
                f"the disk is full: cannot write{path}",
                "free space, or set DATA_DIR to a larger disk; then run the same command again",
            )
        case errno.EFBIG:
            return ExhaustedError(
                f"this file is too large for the disk or for ulimit -f:{path}",
                "set DATA_DIR to another disk, or lower PREPARE_SHARD_SIZE",
            )
        case errno.ENOMEM:
            return _out_of_memory(str(error))
        case errno.EACCES | errno.EPERM | errno.EROFS:
            is_read_only = error.errno == errno.EROFS
            return UserError(
                f"no permission to write or read{path} ({error.strerror})",
                how_to_get_permission(str(error.filename or ""), read_only=is_read_only),
            )
        case errno.EMFILE | errno.ENFILE:
            return UserError(f"too many files are open:{path}", "raise the limit: `ulimit -n 4096`")
        case number if number in _FILE_SYSTEM_FAILS and error.filename:
            return UserError(
                f"the file system fails at{path} ({error.strerror})",
                "see that it is mounted and answers, then run the same command again; "
                "or set DATA_DIR to another disk",
            )
        case number if number in _UNUSABLE_PATH:
            return UserError(f"{error.strerror}:{path}", "use another path, or move that away")
    return None


def _missing_package(name: str) -> UserError | None:
    """Return the error for a missing package; None if it is installed or a part of Python."""
    if not name or name.startswith("_") or find_spec(name):
        return None
    distribution = _DISTRIBUTIONS.get(name, name.replace("_", "-"))
    fix = f"pip install {distribution}"
    if name == "torch":
        fix = "install it as README.md describes: there are builds for CPUs and for GPUs"
    return UserError(f"this needs the Python package {distribution}, which is not installed", fix)


def _out_of_memory(details: str) -> ExhaustedError:
    return ExhaustedError(
        f"out of memory{f': {details}' if details else ''}",
        "use a smaller model or TRAIN_MICRO_BATCH_SIZE, or a machine with more memory",
    )
