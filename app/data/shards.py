"""Token shards: the .bin format.

The format is llm.c's for GPT-2 tokens (Karpathy, llm.c, dev/data/data_common.py): 256
little-endian int32, of which the first three are magic, version and token count, then that many
little-endian uint16 tokens.
"""

import hashlib
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Literal, Self

import numpy as np
import numpy.typing as npt

from app.errors import UserError
from app.files import atomic_file, filename_in_errors

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 1024

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


def open_shard(path: Path) -> Tokens:
    """Memory-map a shard's tokens, uint16 [count].

    Raises:
        UserError: the file is missing, is not a shard, or its size is not the header's.
    """
    fix = "prepare the dataset again, or copy the file again"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(12)
    except OSError as error:
        raise UserError(f"shard {path} cannot be read: {error.strerror}", fix) from None
    if len(head) < 12:
        raise UserError(f"shard {path} is cut off: {size} bytes, its header has 1024", fix)
    magic, version, count = (int(number) for number in np.frombuffer(head, dtype="<i4"))
    if magic != MAGIC:
        raise UserError(
            f"{path} is not a token shard: it begins with {magic}, not {MAGIC}",
            "take it out of the folder, or prepare the dataset again",
        )
    if version != VERSION:
        raise UserError(
            f"shard {path} has version {version}, this program reads {VERSION} (GPT-2 tokens)", fix
        )
    if size != HEADER_BYTES + 2 * count:
        raise UserError(
            f"shard {path} has {size} bytes; its header says {count} tokens, "
            f"which take {HEADER_BYTES + 2 * count}",
            fix,
        )
    if count == 0:
        return np.empty(0, dtype="<u2")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))
