"""Files and folders that appear complete or not at all, and append-only files."""

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedRandom
from pathlib import Path
from typing import Any, TypeVar

from app.errors import UserError

# Suffix of what is still being written, and of a folder while another takes its place.
PARTIAL = ".partial"
REPLACED = f".old{PARTIAL}"
_HASH_BUFFER_BYTES = 16 << 20
# Errors of file systems of networks, clusters and shared folders that lack something.
LACKING = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
NO_FOLDER_FSYNC = "cannot fsync a folder: a power failure may undo what was renamed last"

_T = TypeVar("_T")
_warned: set[str] = set()


def again_if_stale(read: Callable[[], _T]) -> _T:
    """Call a function that opens and reads a file; call it again if the file has turned stale.

    When a file is replaced, a file server forgets those that have it open, but not its name.
    """
    try:
        return read()
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
    return read()


def read_bytes(path: Path) -> bytes:
    """Return a file's content; an OSError names the file."""
    with filename_in_errors(path):
        return again_if_stale(path.read_bytes)


def warn_once(folder: Path, weakness: str) -> None:
    """Print what the file system of a folder lacks, unless this process has printed it."""
    if weakness not in _warned:
        _warned.add(weakness)
        print(f"warning: the file system of {folder} {weakness}", file=sys.stderr, flush=True)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, as hexadecimal digits."""
    return again_if_stale(lambda: _sha256_of(path))


def _sha256_of(path: Path) -> str:
    # hashlib releases the interpreter's lock for each buffer: a large one lets other threads run.
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_HASH_BUFFER_BYTES))
    with filename_in_errors(path), path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def fsync_folder(folder: Path) -> bool:
    """Make renames in `folder` durable: a power failure could undo them otherwise.

    Returns:
        False if its file system cannot do so, which is reported once.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with filename_in_errors(folder):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (*LACKING, errno.EBADF, errno.EACCES, errno.EPERM, errno.EISDIR):
            raise
        warn_once(folder, NO_FOLDER_FSYNC)
        return False
    finally:
        os.close(descriptor)
    return True


@contextmanager
def filename_in_errors(path: Path) -> Iterator[None]:
    """Add `path` to an OSError that has no file name, such as those of write and fsync."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def atomic_file(path: Path) -> Iterator[BufferedRandom]:
    """Open a temporary file that replaces `path`, durably, if the block succeeds."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        with filename_in_errors(path), partial.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        fsync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Create a temporary folder that replaces `folder`, durably, if the block succeeds.

    The block puts files into it, but no folders.
    """
    partial, replaced = (folder.with_name(folder.name + suffix) for suffix in (PARTIAL, REPLACED))
    # An earlier process may have died between the two renames below.
    if replaced.exists() and not folder.exists():
        replaced.rename(folder)
    for leftover in (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    fsync_folder(folder.parent.parent)
    try:
        yield partial
        for path in partial.iterdir():
            with path.open("rb") as written:
                os.fsync(written.fileno())
        fsync_folder(partial)
        if folder.exists():
            folder.rename(replaced)
        try:
            partial.rename(folder)
        except OSError:
            if replaced.exists():
                replaced.rename(folder)
            raise
        fsync_folder(folder.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class AppendOnlyFile:
    """A file that is appended to by whole records; a failed append is repeated by the next one.

    Args:
        path: created if it is missing.
        size: bytes to truncate the file to first, if it is longer; None keeps all of it.
    """

    def __init__(self, path: Path, size: int | None = None) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._size = self._file.seek(0, os.SEEK_END)
        if size is not None and size < self._size:
            self._size = self._file.truncate(size)
        self._pending = b""

    def append(self, record: bytes) -> None:
        """Append a record, after those whose append has failed.

        Raises:
            OSError: the disk is full or fails. The file keeps no part of the record; the next call
                tries again.
        """
        self._pending += record
        written = 0
        with filename_in_errors(self._path):
            # The truncation after an earlier failure may have failed as well.
            self._file.truncate(self._size)
            try:
                while written < len(self._pending):
                    written += self._file.write(self._pending[written:])
            except OSError:
                with suppress(OSError):
                    self._file.truncate(self._size)
                raise
        self._size += written
        self._pending = b""

    def sync(self) -> int:
        """Append what is pending, make the file durable, and return its size in bytes."""
        self.append(b"")
        with filename_in_errors(self._path):
            os.fsync(self._file.fileno())
        return self._size


def json_bytes(value: Any) -> bytes:
    """Return `value` as the content of a file of indented JSON."""
    # A path whose bytes are not UTF-8 has surrogates, which JSON writes as \udcff, for example.
    return json.dumps(value, indent=2, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


def write_json(path: Path, value: Any) -> None:
    """Replace `path` atomically with `value` as indented JSON."""
    with atomic_file(path) as file:
        file.write(json_bytes(value))


def read_json(path: Path, fix: str) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        UserError: the file holds something else; `fix` is the advice.
    """
    try:
        value = json.loads(read_bytes(path))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}", fix) from None
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object", fix)
    return value


def json_value(path: Path, *keys: str) -> Any:
    """Return a value from the nested objects in a file; None if it is missing or damaged."""
    try:
        value: Any = json.loads(read_bytes(path))
    except (OSError, ValueError):
        return None
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value
