import copy
import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from app.cli.process import run
from app.errors import AppError, ExhaustedError, ExitCode, NetworkError, UserError
from app.failures import check_torch_version, compiler_failure, translate_error
from tests.python_process import run_python
from tests.torch_path import needs_torch_compile


@pytest.mark.parametrize(
    ("number", "kind", "problem"),
    (
        (errno.ENOSPC, ExhaustedError, "the disk is full: cannot write data/x"),
        (errno.EDQUOT, ExhaustedError, "the disk is full: cannot write data/x"),
        (errno.EFBIG, ExhaustedError, "this file is too large for the disk"),
        (errno.ENOMEM, ExhaustedError, "out of memory"),
        (errno.EACCES, UserError, "no permission to write or read data/x (Permission denied)"),
        (errno.EROFS, UserError, "no permission to write or read data/x (Read-only file system)"),
        (errno.ESTALE, UserError, "cannot read or write data/x (Stale file handle)"),
        (errno.EIO, UserError, "cannot read or write data/x (Input/output error)"),
        (errno.ENOENT, UserError, "cannot read or write data/x (No such file or directory)"),
        (errno.EMFILE, UserError, "too many files are open: data/x"),
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
    (
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling …",
        "MPS backend out of memory (MPS allocated: 8.00 GB, other allocations: 1.00 GB, …",
    ),
)
def test_gpu_out_of_memory_is_recognized_in_every_wording(message: str) -> None:
    assert isinstance(translate_error(RuntimeError(message)), ExhaustedError)


def test_a_gpu_that_torch_has_no_code_for_is_explained() -> None:
    message = (
        "CUDA error: no kernel image is available for execution on the device\n"
        "Search for `cudaErrorNoKernelImageForDevice' in …"
    )
    error = translate_error(RuntimeError(message))
    assert isinstance(error, UserError)
    assert error.problem.startswith("this torch was not built for this GPU")
    assert "CUDA 12.6" in error.fix
    assert "TRAIN_DEVICE=cpu" in error.fix


@needs_torch_compile
def test_a_gpu_that_triton_has_no_code_for_is_explained() -> None:
    # Importing it takes seconds.
    from torch._inductor.exc import GPUTooOldForTriton

    properties = SimpleNamespace(name="NVIDIA GeForce GTX 1080", major=6, minor=1)
    error = GPUTooOldForTriton(properties, None)  # type: ignore[arg-type]
    known = compiler_failure(error)
    assert known.problem.startswith(
        "torch.compile does not work: Found NVIDIA GeForce GTX 1080 which is too old"
    )
    assert known.fix.startswith("use a GPU of compute capability 7.0 or newer")


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


def install_torch(version: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process find the metadata of a version of torch before the real one's."""
    (folder / "torch.dist-info").mkdir()
    (folder / "torch.dist-info" / "METADATA").write_text(f"Name: torch\nVersion: {version}\n")
    monkeypatch.syspath_prepend(folder)


def test_torch_that_is_too_old_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install_torch("2.8.0+cu126", tmp_path, monkeypatch)
    assert run(["sample"]) == ExitCode.USER
    assert capsys.readouterr() == (
        "",
        "error: torch 2.8.0+cu126 is too old: this program needs torch>=2.11,<2.14\n"
        "  fix: pip install 'torch>=2.11,<2.14', in a build for this machine's driver\n",
    )


@pytest.mark.parametrize(
    ("version", "warning"),
    (
        ("2.11.0a0+git12345", ""),
        ("2.13.1", ""),
        ("unknown", ""),
        ("2.14.1", "torch 2.14.1 has not been tried with this program: torch>=2.11,<2.14 has"),
        ("3.0", "torch 3.0 has not been tried with this program: torch>=2.11,<2.14 has"),
    ),
)
def test_torch_that_is_newer_is_warned_of(
    version: str,
    warning: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    install_torch(version, tmp_path, monkeypatch)
    check_torch_version()
    assert capsys.readouterr().err == (f"warning: {warning}\n" if warning else "")


@pytest.mark.parametrize("name", ("json.absent", "_absent", None))
def test_missing_part_of_an_installed_package_is_a_bug(name: str | None) -> None:
    assert translate_error(ModuleNotFoundError("", name=name)) is None


@pytest.mark.parametrize("kind", (AppError, UserError, NetworkError))
def test_error_is_the_same_after_copying_as_between_processes(kind: type[AppError]) -> None:
    error = copy.copy(kind("the problem", "the fix"))
    assert type(error) is kind
    assert (error.problem, error.fix) == ("the problem", "the fix")
    assert str(error) == "the problem\n  fix: the fix"


COMPILE_ERROR = """\
C++ compile error

Command:
g++ /c/main.cpp -D TORCH_INDUCTOR_CPP_WRAPPER -shared -fPIC -o /c/main.so

Output:
In file included from /c/main.cpp:1:
{}
compilation terminated.
"""
# What torch and the compilers reported when these were really tried -> what is said, and the fix.
COMPILER_FAILURES = {
    COMPILE_ERROR.format("t/cpp_prefix.h:4:10: fatal error: omp.h: No such file or directory"): (
        "torch.compile does not work: t/cpp_prefix.h:4:10: fatal error: omp.h: No such file or "
        "directory",
        "install what it lacks (apt-get install g++ libc6-dev python3-dev)",
    ),
    COMPILE_ERROR.format("/usr/bin/ld: cannot find -lgomp: No such file or directory"): (
        "torch.compile does not work: /usr/bin/ld: cannot find -lgomp: No such file or directory",
        "install what it lacks (apt-get install g++ libc6-dev python3-dev)",
    ),
    COMPILE_ERROR.format("<built-in>: fatal error: when writing /t/h.i: No space left on device"): (
        "torch.compile does not work: <built-in>: fatal error: when writing /t/h.i: No space left "
        "on device",
        "free space there, or set TMPDIR and TORCHINDUCTOR_CACHE_DIR to a larger disk",
    ),
    "No working C++ compiler found in torch._inductor.config.cpp.cxx: (None, 'g++')": (
        "torch.compile does not work: No working C++ compiler found in "
        "torch._inductor.config.cpp.cxx: (None, 'g++')",
        "make `g++ --version` work (apt-get install --reinstall g++)",
    ),
    "/c/m.so: failed to map segment from shared object.  The most common reason this may occur": (
        "torch.compile does not work: /c/m.so: failed to map segment from shared object",
        "set TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR to folders that may execute",
    ),
    "[Errno 30] Read-only file system: '/c/73'": (
        "torch.compile does not work: [Errno 30] Read-only file system: '/c/73'",
        "set TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR to writable folders",
    ),
    "Command '['/usr/bin/gcc', '/t/main.c']' returned non-zero exit status 1.": (
        "torch.compile does not work: Command '['/usr/bin/gcc', '/t/main.c']' returned non-zero "
        "exit status 1.",
        "install what it lacks (apt-get install g++ libc6-dev python3-dev)",
    ),
    "": ("torch.compile does not work: RuntimeError('')", "please report this"),
}


@pytest.fixture
def usual_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CXX", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)


@needs_torch_compile
@pytest.mark.parametrize("text", COMPILER_FAILURES)
@pytest.mark.usefixtures("usual_compiler")
def test_a_failure_of_the_compiler_is_told_in_its_own_words(text: str) -> None:
    known = compiler_failure(RuntimeError(text))
    assert (known.problem, known.fix) == COMPILER_FAILURES[text]


@needs_torch_compile
@pytest.mark.parametrize(
    ("variable", "value", "problem", "fix"),
    (
        (
            "CXX",
            "ccache g++",
            "with the spaces or quotes in 'ccache g++'",
            "set CXX to a path without",
        ),
        ("CXX", "it's", 'with the spaces or quotes in "it\'s"', "set CXX to a path without them"),
        ("CXX", "/none", ": CXX='/none' is not a C++ compiler", "set CXX to the path of a compil"),
        ("CXX", "", ": CXX='' is not a C++ compiler", "works, or unset it"),
        ("TORCHINDUCTOR_CACHE_DIR", "/a b", "with the spaces or quotes in '/a b'", "CACHE_DIR to"),
    ),
)
@pytest.mark.usefixtures("usual_compiler")
def test_a_variable_that_the_compiler_cannot_take_is_named(
    variable: str, value: str, problem: str, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    known = compiler_failure(RuntimeError("No working C++ compiler found"))
    assert known.problem.startswith("torch.compile does not work")
    assert known.problem.endswith(problem)
    assert fix in known.fix


FAILS_IN_A_STEP = """
import torch
from torch._inductor.exc import CppCompileError
from app.cli.process import run_and_report

def fails(graph, inputs):
    raise CppCompileError(["g++"], "m.cpp:7: error: no registers left")

compiled = torch.compile(lambda x: x + 1, backend=fails)
print(run_and_report(lambda: compiled(torch.ones(1))))
"""


@needs_torch_compile
@pytest.mark.processes
def test_a_compiler_that_fails_in_a_step_is_not_a_bug() -> None:
    ended = run_python(FAILS_IN_A_STEP)
    assert ended.stdout == "2\n"
    assert ended.stderr == (
        "error: torch.compile does not work: m.cpp:7: error: no registers left\n"
        "  fix: install what it lacks (apt-get install g++ libc6-dev python3-dev); "
        "or set TRAIN_COMPILE=false, which trains without it, slower\n"
    )


@pytest.mark.parametrize(
    ("user", "number", "fix"),
    (
        (1000, errno.EACCES, "give it to user 1000, or set DATA_DIR to a folder of that user"),
        (0, errno.EPERM, "its file system refuses even user 0: change its mount or rules, or set "),
        (0, errno.EROFS, "mount its disk writable, or set DATA_DIR to a folder on another disk"),
        (1000, errno.EROFS, "mount its disk writable, or set DATA_DIR to a folder on another disk"),
    ),
)
def test_advice_on_permissions_is_what_this_user_can_do(
    user: int, number: int, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: user)
    error = translate_error(OSError(number, os.strerror(number), "data/x"))
    assert error is not None
    assert error.fix.startswith(fix)
