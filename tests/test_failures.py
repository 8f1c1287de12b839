import copy
import errno
import os

import pytest

from app.errors import AppError, ExhaustedError, NetworkError, UserError
from app.failures import translate_error


@pytest.mark.parametrize(
    ("number", "kind", "problem"),
    (
        (errno.ENOSPC, ExhaustedError, "the disk is full: cannot write data/x"),
        (errno.EDQUOT, ExhaustedError, "the disk is full: cannot write data/x"),
        (errno.EFBIG, ExhaustedError, "this file is too large for the disk"),
        (errno.ENOMEM, ExhaustedError, "out of memory"),
        (errno.EACCES, UserError, "no permission to write or read data/x (Permission denied)"),
        (errno.EROFS, UserError, "no permission to write or read data/x (Read-only file system)"),
        (errno.ENOTDIR, UserError, "Not a directory: data/x"),
        (errno.ENAMETOOLONG, UserError, "File name too long: data/x"),
    ),
)
def test_os_errors_are_explained(number: int, kind: type[Exception], problem: str) -> None:
    error = translate_error(OSError(number, os.strerror(number), "data/x"))
    assert type(error) is kind
    assert error.problem.startswith(problem)
    assert error.fix


@pytest.mark.parametrize(
    "message",
    ("CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling …"),
)
def test_gpu_out_of_memory_is_recognized_in_every_wording(message: str) -> None:
    assert isinstance(translate_error(RuntimeError(message)), ExhaustedError)


@pytest.mark.parametrize(
    "error",
    (OSError(errno.EIO, "Input/output error"), RuntimeError("shapes differ"), FileNotFoundError()),
)
def test_bugs_are_not_explained(error: Exception) -> None:
    assert translate_error(error) is None


def test_missing_package_is_named_as_pip_knows_it() -> None:
    error = translate_error(ModuleNotFoundError("", name="yaml_absent.nodes"))
    assert isinstance(error, UserError)
    assert error.problem.startswith("this needs the Python package yaml-absent,")
    assert error.fix == "pip install yaml-absent"


@pytest.mark.parametrize("name", ("json.absent", "_absent", None))
def test_missing_part_of_an_installed_package_is_a_bug(name: str | None) -> None:
    assert translate_error(ModuleNotFoundError("", name=name)) is None


@pytest.mark.parametrize("kind", (AppError, UserError, NetworkError))
def test_error_is_the_same_after_copying_as_between_processes(kind: type[AppError]) -> None:
    error = copy.copy(kind("the problem", "the fix"))
    assert type(error) is kind
    assert (error.problem, error.fix) == ("the problem", "the fix")
    assert str(error) == "the problem\n  fix: the fix"
