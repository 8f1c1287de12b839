"""Token shards: the .bin format.

The format is llm.c's for GPT-2 tokens (Karpathy, llm.c, dev/data/data_common.py): 256
little-endian int32, of which the first three are magic, version and token count, then that many
little-endian uint16 tokens.
"""

import hashlib
import os
import resource
from contextlib import ExitStack, suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from app.errors import UserError
from app.files import again_if_stale, atomic_file, filename_in_errors

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 1024

_FIX = "copy the file again, or delete the folder and prepare the dataset again"

Split = Literal["train", "val"]
Tokens = npt.NDArray[np.uint16]


def shard_name(name: str, split: Split, index: int) -> str:
    """Return a shard's file name: fineweb_000000.bin, fineweb_val_000000.bin."""
    return f"{name}_{'val_' if split == 'val' else ''}{index:06d}.bin"


class ShardFile:
    """A shard that is written incrementally, and renamed into place on commit.

    As a context manager it deletes a shard that was not committed.

    Args:
        path: final path.
        expected: tokens that will be written; a different count is fine, but commit() must then
            reread the shard to hash it.

    Attributes:
        tokens: written so far
    """

    def __init__(self, path: Path, expected: int) -> None:
        self.path, self.tokens = path, 0
        self._expected = expected
        # Makes atomic_file see a failure, so that it deletes the partial file.
        self._stack = ExitStack()
        self._file = self._stack.enter_context(atomic_file(path))
        self._digest = hashlib.sha256()
        self._put(_header(expected))

    def write(self, tokens: Tokens) -> None:
        """Append uint16 tokens [count]."""
        self._put(np.ascontiguousarray(tokens, "<u2").data)
        self.tokens += tokens.size

    def commit(self) -> str:
        """Complete the shard, and return its SHA-256."""
        with self._stack:
            if self.tokens != self._expected:
                self._file.seek(0)
                self._file.write(_header(self.tokens))
                self._file.seek(0)
                self._digest = hashlib.file_digest(self._file, "sha256")
        return self._digest.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        with suppress(_Discarded), self._stack:
            raise _Discarded

    def _put(self, content: bytes | memoryview) -> None:
        with filename_in_errors(self.path):
            self._file.write(content)
        self._digest.update(content)


class _Discarded(Exception):
    """The shard was not committed."""


def _header(tokens: int) -> bytes:
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens
    return header.tobytes()


class Shard:
    """The tokens of a shard file; shard[begin:end] reads them, uint16 [end - begin].

    They are read, not memory-mapped: some file systems map no files, the error of a mapped file is
    a signal that ends the process, and a map of each of a thousand shards keeps as many files open.

    Attributes:
        path: the file
        size: number of tokens
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice) -> Tokens:
        """Read tokens.

        Raises:
            OSError: the file cannot be read any more.
            UserError: it is not the one that was opened.
        """
        begin, end, _ = part.indices(self.size)
        return again_if_stale(lambda: self._read(begin, max(0, end - begin)))

    def _read(self, begin: int, count: int) -> Tokens:
        tokens = np.empty(count, dtype="<u2")
        file, offset, done = _open_files()(self), HEADER_BYTES + 2 * begin, 0
        # A single read returns at most 2 GiB.
        while done < count:
            try:
                read = os.preadv(file.descriptor, [tokens.data[done:]], offset + 2 * done)
            except OSError as error:
                _open_files().cache_clear()
                error.filename = str(self.path)
                raise
            if read < 2:
                raise UserError(f"shard {self.path} has been cut off", _FIX)
            done += read // 2
        return tokens


class _OpenFile:
    """A file that is open as long as there are references to it."""

    def __init__(self, shard: Shard) -> None:
        self.descriptor = os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC)
        if os.fstat(self.descriptor).st_size != HEADER_BYTES + 2 * shard.size:
            raise UserError(f"shard {shard.path} has changed while it was in use", _FIX)

    def __del__(self) -> None:
        with suppress(AttributeError):
            os.close(self.descriptor)


@cache
def _open_files() -> Any:
    """Return the files opened last: at most half as many as this process may open."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return lru_cache(limit // 2 if limit > 0 else None)(_OpenFile)


def open_shard(path: Path) -> Shard:
    """Check a shard's header and size.

    Raises:
        UserError: the file is missing, is not a shard, or its size is not the header's.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(12)
    except OSError as error:
        raise UserError(f"shard {path} cannot be read: {error.strerror}", _FIX) from None
    if len(head) < 12:
        raise UserError(f"shard {path} is cut off: {size} bytes, its header has 1024", _FIX)
    magic, version, count = (int(number) for number in np.frombuffer(head, dtype="<i4"))
    if magic != MAGIC:
        raise UserError(
            f"{path} is not a token shard: it begins with {magic}, not {MAGIC}",
            "take it out of the folder, or prepare the dataset again",
        )
    if version != VERSION:
        raise UserError(
            f"shard {path} has version {version}, this program reads {VERSION} (GPT-2 tokens)", _FIX
        )
    if size != HEADER_BYTES + 2 * count:
        raise UserError(
            f"shard {path} has {size} bytes; its header says {count} tokens, "
            f"which take {HEADER_BYTES + 2 * count}",
            _FIX,
        )
    return Shard(path, count)
