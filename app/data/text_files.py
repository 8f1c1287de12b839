"""Documents in files, here or on the hub: plain text, JSON lines, parquet.

Parquet is read a row group at a time through a file system, which reads only the text column and
nothing twice.
"""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from app.data.batches import Batch, batched
from app.errors import UserError

KINDS = (".txt", ".md", ".py", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_PIECE_BYTES = 1 << 20
_PIECE_ROWS = 1024
_DAMAGE = (
    EOFError,
    gzip.BadGzipFile,
    lzma.LZMAError,
    zlib.error,
    pa.ArrowInvalid,
    UnicodeDecodeError,
)


@dataclass(frozen=True)
class SourceFile:
    """A file of text: `path` opens it, `name` says its place in the source."""

    path: str
    name: str
    bytes: int


@dataclass
class FileDocuments:
    """Documents in files of one file system, local or remote."""

    files: list[SourceFile]
    text_column: str
    source: Mapping[str, Any]
    filesystem: AbstractFileSystem = field(default_factory=LocalFileSystem)
    counts: Counter[str] = field(default_factory=Counter)

    def batches(self) -> Iterator[Batch]:
        """All documents, in order; see app.data.batches.Documents."""
        return batched(self._texts(), self.counts)

    def _texts(self) -> Iterator[tuple[list[Any], float]]:
        total_bytes = sum(file.bytes for file in self.files) or 1
        done_bytes = 0
        for file in self.files:
            try:
                for values, fraction in self._read(file):
                    yield values, (done_bytes + fraction * file.bytes) / total_bytes
            except _DAMAGE as error:
                raise _damaged(file, error) from error
            except OSError as error:
                # bz2 and Arrow raise the bare class for bad data; the system's errors have numbers.
                if type(error) is OSError and error.errno is None:
                    raise _damaged(file, error) from error
                raise
            done_bytes += file.bytes

    def _read(self, file: SourceFile) -> Iterator[tuple[list[Any], float]]:
        with self.filesystem.open(file.path, "rb", cache_type="none") as raw:
            match kind_of(file.name):
                case ".parquet":
                    yield from self._rows(file, raw)
                case ".jsonl":
                    yield from self._lines(file, raw)
                case _:
                    yield [self._decoded(_decompressed(raw, file.name).read())], 1.0

    def _decoded(self, content: bytes) -> str:
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError:
            self.counts["not_utf8"] += 1
            return content.decode("utf-8-sig", "replace")

    def _lines(self, file: SourceFile, raw: BinaryIO) -> Iterator[tuple[list[Any], float]]:
        first = 1
        lines = _decompressed(raw, file.name)
        while piece := lines.readlines(_PIECE_BYTES):
            rows = [
                _json_object(line, f"{file.path}, line {number}")
                for number, line in enumerate(piece, start=first)
                if line.strip()
            ]
            if first == 1 and rows and not any(self.text_column in row for row in rows):
                raise _no_column(file, self.text_column, rows[0])
            first += len(piece)
            yield [row.get(self.text_column) for row in rows], raw.tell() / file.bytes

    def _rows(self, file: SourceFile, raw: BinaryIO) -> Iterator[tuple[list[Any], float]]:
        parquet = pq.ParquetFile(raw, pre_buffer=True)
        columns = parquet.schema_arrow.names
        if self.text_column not in columns:
            raise _no_column(file, self.text_column, columns)
        done_rows = 0
        for group in range(parquet.num_row_groups):
            table = parquet.read_row_group(group, columns=[self.text_column])
            for rows in table.to_batches(max_chunksize=_PIECE_ROWS):
                done_rows += rows.num_rows
                yield rows.column(0).to_pylist(), done_rows / parquet.metadata.num_rows


def _decompressed(raw: BinaryIO, name: str) -> BinaryIO:
    match PurePosixPath(name.lower()).suffix:
        case ".gz":
            return cast(BinaryIO, gzip.open(raw))
        case ".bz2":
            return cast(BinaryIO, bz2.open(raw))
        case ".xz":
            return cast(BinaryIO, lzma.open(raw))
        case ".zst":
            # Unlike zstandard's reader, Arrow's says so when the end is missing.
            return io.BufferedReader(pa.CompressedInputStream(raw, "zstd"))
        case _:
            return raw


def _json_object(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(
            f"{place} is not JSON: {error}", "write one JSON object a line, or leave it out"
        ) from None
    if not isinstance(row, dict):
        raise UserError(
            f"{place} is not a JSON object", 'write one object a line, such as {"text": "…"}'
        )
    return row


def _no_column(file: SourceFile, column: str, columns: Iterable[str]) -> UserError:
    return UserError(
        f"{file.path} has no column {column!r}",
        f"set PREPARE_TEXT_COLUMN to one of: {', '.join(columns)}",
    )


def _damaged(file: SourceFile, error: Exception) -> UserError:
    return UserError(f"{file.path} is damaged: {error}", "replace it, or leave it out")


def kind_of(name: str) -> str | None:
    """The kind of text file that `name` says: .txt, .jsonl, …; None if it is no text file."""
    path = PurePosixPath(name.lower())
    if path.suffix in COMPRESSIONS and path.stem.endswith(".parquet"):
        return None  # compressed inside, and unreadable by row groups from outside
    suffix = path.with_suffix("").suffix if path.suffix in COMPRESSIONS else path.suffix
    return suffix if suffix in KINDS else None


def listing(files: Iterable[SourceFile]) -> str:
    """SHA-256 of names and sizes, in order: it changes when files come, go or grow."""
    return digest("".join(f"{file.name}\t{file.bytes}\n" for file in files))


def digest(text: str) -> str:
    """SHA-256 of a text, which may be any file's name."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
