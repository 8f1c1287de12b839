"""Files of text: their kinds, their order, and what tells that they have changed."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from app.prepare.text_streams import COMPRESSIONS

# What a file's name ends with -> how it is read.
_KINDS = {
    ".txt": ".txt",
    ".md": ".md",
    ".py": ".py",
    ".jsonl": ".jsonl",
    ".ndjson": ".jsonl",
    ".json": ".jsonl",
    ".parquet": ".parquet",
}
KINDS = tuple(kind for kind in _KINDS if kind != ".json")


@dataclass(frozen=True)
class SourceFile:
    """A file of text.

    Attributes:
        path: opens it
        name: its path within the source
        bytes: its size
        modified: when it was last modified, in nanoseconds; 0 on the hub
    """

    path: str
    name: str
    bytes: int
    modified: int = 0


def source_file(path: Path, name: str) -> SourceFile:
    """Return a local file as it is now."""
    status = path.stat()
    return SourceFile(str(path.absolute()), name, status.st_size, status.st_mtime_ns)


def kind_of(name: str) -> str | None:
    """Return how a file is read, from its name: .txt, .jsonl, …; None for any other file."""
    path = PurePosixPath(name.lower())
    if path.suffix in COMPRESSIONS:
        inner = path.with_suffix("").suffix
        # Parquet compresses by itself; with more around it, no row group can be read.
        return None if inner == ".parquet" else _KINDS.get(inner)
    return _KINDS.get(path.suffix)


def listing(files: Iterable[SourceFile]) -> str:
    """Return the SHA-256 of names and sizes, in order: it changes with any of them."""
    return digest("".join(f"{file.name}\t{file.bytes}\n" for file in files))


def digest(text: str) -> str:
    """Return the SHA-256 of a text, which may be any file's name."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
