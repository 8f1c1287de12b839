"""File systems that lack something, for the processes that get these variables."""

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest


def lacking(folder: Path, **calls: int | str) -> dict[str, str]:
    """Variables of a process for which some calls fail below a folder; see lacking.c.

    Args:
        calls: the call, with _ for -, and its error number, or "NUMBER*TIMES".
    """
    lacks = ",".join(f"{call.replace('_', '-')}={error}" for call, error in calls.items())
    return {"LD_PRELOAD": str(_library()), "LACKS_IN": str(folder.resolve()), "LACKS": lacks}


@functools.cache
def _library() -> Path:
    """The compiled lacking.c, in a folder that goes with this process."""
    compiler = shutil.which("g++") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler for the library that makes a file system lack something")
    folder = tempfile.TemporaryDirectory(prefix="lacking-")
    _folders.append(folder)
    source, library = Path(__file__).with_name("lacking.c"), Path(folder.name, "lacking.so")
    compile_c = [compiler, "-x", "c", "-shared", "-fPIC", "-D_FILE_OFFSET_BITS=32"]
    subprocess.run([*compile_c, "-o", library, source, "-ldl"], check=True)
    return library


_folders: list[tempfile.TemporaryDirectory[str]] = []
