"""Files of text: their kinds, and how a change of them is noticed."""

import hashlib
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class SourceFile:
    """A file of text.

    Attributes:
        path: where to open it
        name: its path within the source
        bytes: its size
        changed: when its content or state last changed, in nanoseconds; 0 on the hub
    """

    path: str
    name: str
    bytes: int
    changed: int = 0


def source_file(path: str, name: str) -> SourceFile | None:
    """Return a local file as it is now; None if it is not a regular file.

    A broken link counts as an empty file, and reading it is an error.
    """
    try:
        status = os.stat(path)  # noqa: PTH116 (a Path takes longer for each of many files)
    except OSError:
        return SourceFile(path, name, 0)
    if not stat.S_ISREG(status.st_mode):
        return None
    return SourceFile(path, name, status.st_size, status.st_ctime_ns)


def listing(files: Iterable[SourceFile]) -> str:
    """Return the SHA-256 of names and sizes, in order: it changes with any of them."""
    return digest("".join(f"{file.name}\t{file.bytes}\n" for file in files))


def digest(text: str) -> str:
    """Return the SHA-256 of a text, which may hold a file's name that is not UTF-8."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
