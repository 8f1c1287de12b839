"""Files that are complete under their final name, and folders that one process owns."""

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedRandom
from pathlib import Path
from typing import Any

from app.errors import UserError

PARTIAL = ".partial"
_HASHED_BYTES = 16 << 20
# A folder that is being replaced has this name for a moment.
REPLACED = f".old{PARTIAL}"


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, read in large pieces: other threads go on within one."""
    digest, piece = hashlib.sha256(), memoryview(bytearray(_HASHED_BYTES))
    with named(path), path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            digest.update(piece[:count])
    return digest.hexdigest()


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: without it a rename can be lost with the power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Add the file's name to the system's errors: those of a write or fsync lack it."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def atomic_file(path: Path) -> Iterator[BufferedRandom]:
    """Open a temporary file beside `path` that takes its name when the block ends well."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        with named(path), partial.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        fsync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Fill a temporary folder with files; it takes the name of `folder` when the block ends well.

    One that is there already is replaced.
    """
    partial, before = (folder.with_name(folder.name + ending) for ending in (PARTIAL, REPLACED))
    if before.exists() and not folder.exists():
        before.rename(folder)
    for left in (partial, before):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    fsync_folder(folder.parent.parent)
    try:
        yield partial
        for path in partial.iterdir():
            with path.open("rb") as written:
                os.fsync(written.fileno())
        fsync_folder(partial)
        if folder.exists():
            folder.rename(before)
        try:
            partial.rename(folder)
        except OSError:
            if before.exists():
                before.rename(folder)
            raise
        fsync_folder(folder.parent)
        shutil.rmtree(before, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class AppendOnlyFile:
    """A file that grows by whole pieces: one that the disk does not take is kept for later.

    Args:
        path: created if it is missing.
        size: cut the file back to so many bytes; None leaves it.
    """

    def __init__(self, path: Path, size: int | None = None) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._size = self._file.seek(0, os.SEEK_END)
        if size is not None and size < self._size:
            self._size = self._file.truncate(size)
        self._waiting = b""

    def append(self, piece: bytes) -> None:
        """Write a piece after those before.

        Raises:
            OSError: the disk is full or fails; the next call tries again.
        """
        self._waiting += piece
        written = 0
        with named(self._path):
            # No half a piece stays of a write that has failed.
            self._file.truncate(self._size)
            try:
                while written < len(self._waiting):
                    written += self._file.write(self._waiting[written:])
            except OSError:
                with suppress(OSError):
                    self._file.truncate(self._size)
                raise
        self._size += written
        self._waiting = b""

    def sync(self) -> int:
        """Make all of it durable, and tell its size in bytes."""
        self.append(b"")
        with named(self._path):
            os.fsync(self._file.fileno())
        return self._size


def write_json(path: Path, value: Any) -> None:
    """Replace `path` atomically with `value` as readable JSON."""
    with atomic_file(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")


def read_json(path: Path, fix: str) -> dict[str, Any]:
    """Read a JSON object; UserError names the file and what is wrong with it."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}", fix) from None
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object", fix)
    return value


@contextmanager
def locked(folder: Path, owner: str, *, waits: bool = False) -> Iterator[None]:
    """Own `folder` until the block or the process ends; UserError if another process does.

    The kernel drops the lock with the process, so a killed one leaves none behind. A file server
    does it later if the machine has died as well.

    Args:
        owner: what works on such a folder.
        waits: for the lock, whoever has it.
    """
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not waits:
                raise UserError(
                    f"another process is working on {folder}",
                    f"wait for that {owner} to end, or stop it",
                ) from None
            print(f"waiting for the {owner} that has {folder}", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
