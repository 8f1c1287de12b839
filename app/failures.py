"""Explanations of the failures that come from the machine, not from this program."""

import errno
import os
import re
import shlex
import sys
import sysconfig
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from traceback import walk_tb

from app.containers import how_to_get_permission, is_installed
from app.errors import AppError, ExhaustedError, UserError

# In messages of torch, CUDA and cuBLAS about memory that has run out, if the type does not say so.
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "Storage size calculation overflowed",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
)
# Import name -> distribution, where "_" -> "-" does not lead from one to the other.
_DISTRIBUTIONS = {
    "dotenv": "python-dotenv",
    "tiktoken_ext": "tiktoken",
    "vl_convert": "vl-convert-python",
    "yaml": "pyyaml",
}
# Distribution -> the extra of this package that has it.
_EXTRAS = {
    **dict.fromkeys(("jinja2", "vl-convert-python"), "report"),
    **dict.fromkeys(("starlette", "uvicorn"), "playground"),
    **dict.fromkeys(("trackio", "wandb"), "trackers"),
}
# The first version that works, and the first that has not been tried.
TORCH_VERSIONS = (2, 11), (2, 14)
# Errors of a disk or file server that breaks, goes away, or lacks what others can do.
_FILE_SYSTEM_FAILS = (
    # Linux alone has EREMOTEIO.
    *(
        errno.EIO,
        getattr(errno, "EREMOTEIO", errno.EIO),
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.EHOSTDOWN,
        errno.ENOTCONN,
    ),
    *(errno.ENODEV, errno.ENXIO, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK),
    *(errno.EBUSY, errno.ENOTEMPTY, errno.EXDEV, errno.ENOENT),
)
# Part of what torch.compile reports -> how to mend it; the first match counts.
_COMPILER_FIXES = {
    r"No working C\+\+": "make `g++ --version` work (apt-get install --reinstall g++)",
    "map segment": "set TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR to folders that may execute",
    "No space left": "free space there, or set TMPDIR and TORCHINDUCTOR_CACHE_DIR to a larger disk",
    "Read-only|denied": "set TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR to writable folders",
    "too old": "use a GPU of compute capability 7.0 or newer; TRAIN_COMPILE=false hides this line",
    "compile error|gcc": "install what it lacks (apt-get install g++ libc6-dev python3-dev)",
    "": "please report this",
}
_UNUSABLE_PATH = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)


def translate_error(error: Exception) -> AppError | None:
    """Return an AppError that explains the failure and its fix; None if `error` is a bug."""
    if isinstance(error, OSError):
        return _os_error(error)
    if isinstance(error, ModuleNotFoundError):
        return _missing_package((error.name or "").partition(".")[0])
    if isinstance(error, ValueError):
        return _wrong_hub_variable(error)
    # Recognized by name and message, because importing torch takes seconds.
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(message in str(error) for message in _OUT_OF_MEMORY)
    ):
        return _out_of_memory(str(error).partition("\n")[0])
    if "no kernel image is available" in str(error):
        return UserError(
            "this torch was not built for this GPU: its warning above names those that it supports",
            "install torch for CUDA 12.6, the last with code for the generations before Turing "
            "(docs/cloud.md), or a newer torch for a newer GPU; or set TRAIN_DEVICE=cpu",
        )
    if type(error).__name__ in ("BackendCompilerFailed", "InductorError"):
        known = compiler_failure(error)
        fix = f"{known.fix}; or set TRAIN_COMPILE=false, which trains without it, slower"
        return UserError(known.problem, fix)
    return None


def check_torch_version() -> None:
    """Print a warning if the installed torch is newer than this program knows.

    Raises:
        UserError: it is too old.
    """
    installed = ""
    with suppress(PackageNotFoundError):  # a build without metadata, or none
        installed = version("torch")
    found = re.match(r"(\d+)\.(\d+)", installed)
    if found is None:
        return
    oldest, newer = TORCH_VERSIONS
    numbers = int(found[1]), int(found[2])
    wanted = ">={}.{},<{}.{}".format(*oldest, *newer)
    if numbers < oldest:
        raise UserError(
            f"torch {installed} is too old: this program needs torch{wanted}",
            f"pip install 'torch{wanted}', in a build for this machine's driver",
        )
    if numbers >= newer:
        text = f"warning: torch {installed} has not been tried with this program: torch{wanted} has"
        print(text, file=sys.stderr, flush=True)


def compiler_failure(error: BaseException) -> UserError:
    """Return why torch.compile has failed, in the compiler's own words, and how to mend it."""
    text = str(getattr(error, "inner_exception", error))
    compiler, torch = os.environ.get("CXX", "g++"), find_spec("torch")
    for fix, path in (
        ("set CXX to", compiler),
        ("set TORCHINDUCTOR_CACHE_DIR to", os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")),
        ("install torch in", torch and torch.origin),
        ("use a Python in", sysconfig.get_path("include")),
    ):
        if path and not is_one_word(path):
            problem = f"torch.compile does not work with the spaces or quotes in {path!r}"
            return UserError(problem, f"{fix} a path without them")
    if "CXX" in os.environ and ("No working C++" in text or f"denied: {compiler!r}" in text):
        problem = f"torch.compile does not work: CXX={compiler!r} is not a C++ compiler"
        return UserError(problem, "set CXX to the path of a compiler that works, or unset it")
    output = text.partition("Output:\n")[2] or text
    lines = [line.strip() for line in output.splitlines() if line.strip()] or [repr(error)]
    is_reason = re.compile(r"\berror: |cannot find|No such file").search
    # torch adds a guess at the cause after two spaces.
    reason = next(filter(is_reason, lines), lines[0]).partition(".  ")[0]
    fix = next(fix for words, fix in _COMPILER_FIXES.items() if re.search(words, text))
    return UserError(f"torch.compile does not work: {reason:.300}", fix)


def is_one_word(path: str) -> bool:
    """Return True if the path stays whole in the command lines that torch.compile splits."""
    with suppress(ValueError):
        return shlex.split(path) == [path]
    return False


def _os_error(error: OSError) -> AppError | None:
    path = f" {error.filename}" if error.filename else ""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return ExhaustedError(
                f"the disk is full{path and f': cannot write{path}'}",
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
            return UserError(
                f"too many files are open{path and ':'}{path}", "raise the limit: ulimit -n 4096"
            )
        case number if number in _FILE_SYSTEM_FAILS and error.filename:
            return UserError(
                f"cannot read or write{path} ({error.strerror})",
                "see that its disk is mounted and answers; then run the same command again",
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
        fix = "install it as docs/install.md describes: there are builds for CPUs and for GPUs"
    elif is_installed() and distribution in _EXTRAS:
        fix = f"pip install 'gpt-compose[{_EXTRAS[distribution]}]'"
    return UserError(f"this needs the Python package {distribution}, which is not installed", fix)


def _wrong_hub_variable(error: ValueError) -> UserError | None:
    """Return the error for variables that huggingface_hub cannot read; None if it is another."""
    importing = (it for it, _ in walk_tb(error.__traceback__) if it.f_code.co_name == "<module>")
    if not any(it.f_globals["__name__"].startswith("huggingface_hub.") for it in importing):
        return None
    # Names only: a value may be a secret.
    names = ", ".join(sorted(name for name in os.environ if name.startswith("HF_")))
    return UserError(f"the hub cannot be asked: {error}", f"correct one of the variables {names}")


def _out_of_memory(details: str) -> ExhaustedError:
    return ExhaustedError(
        f"out of memory{f': {details}' if details else ''}",
        "use a smaller model or TRAIN_MICRO_BATCH_SIZE, or a machine with more memory",
    )
