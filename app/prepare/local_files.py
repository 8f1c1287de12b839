"""Documents in files, local or on the hub: plain text, JSON lines, parquet.

Parquet is read a row group at a time: only the text column, and nothing twice.
"""

import bz2
import errno
import gzip
import hashlib
import io
import itertools
import lzma
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from app.errors import UserError
from app.prefetch import prefetch
from app.prepare.documents import Position, RowChunk
from app.prepare.json_lines import blocks, count_lines, objects, texts_of_lines
from app.prepare.texts import arrow_texts, as_texts

KINDS = (".txt", ".md", ".py", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_CHUNK_BYTES = 4 << 20
_CHUNK_ROWS = 1024
_AHEAD_BYTES = 64 << 20
_SEARCHED_BYTES = 1 << 20
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
    """A file of text: `path` opens it, `name` is its path within the source."""

    path: str
    name: str
    bytes: int


@dataclass
class FileDocuments:
    """Documents in files of one file system, local or remote, in the order of `files`."""

    files: list[SourceFile]
    text_column: str
    source: Mapping[str, Any]
    filesystem: AbstractFileSystem = field(default_factory=LocalFileSystem)
    row_groups_ahead: int = 4

    def chunks(self, start: Position) -> Generator[RowChunk]:
        """Yield all rows from `start` on; see app.prepare.documents.Documents."""
        total_bytes = sum(file.bytes for file in self.files) or 1
        done_bytes = sum(file.bytes for file in self.files[: start.file])
        for index, file in enumerate(self.files[start.file :], start.file):
            first_row = start.row if index == start.file else 0
            with file_errors(file):
                for chunk in self._read(file, Position(index, first_row)):
                    done = (done_bytes + (chunk.fraction or 0.0) * file.bytes) / total_bytes
                    yield replace(chunk, fraction=done)
            done_bytes += file.bytes

    def _read(self, file: SourceFile, start: Position) -> Iterator[RowChunk]:
        """Yield the rows of a file from `start` on; fractions are of the file."""
        match kind_of(file.name):
            case ".parquet":
                yield from self._row_groups(file, start)
            case ".jsonl":
                with self.open(file) as raw:
                    yield from self._lines(file, raw, start)
            case _ if start.row == 0:
                with self.open(file) as raw:
                    content = _decompressed(raw, file.name).read()
                text, not_utf8 = _decoded(content)
                texts = partial(as_texts, [text], file.path)
                yield RowChunk(start, 1, len(content), texts, 1.0, not_utf8)

    def open(self, file: SourceFile) -> BinaryIO:
        """Open a file of the source for reading."""
        return cast(BinaryIO, self.filesystem.open(file.path, "rb", cache_type="none"))

    def _lines(self, file: SourceFile, raw: BinaryIO, start: Position) -> Iterator[RowChunk]:
        row = 0
        has_column = start.row > 0
        for block in blocks(_decompressed(raw, file.name)):
            first, row = row, row + count_lines(block)
            if row <= start.row:
                continue
            has_column = has_column or self._has_column(file, block, first)
            skipped = max(start.row - first, 0)
            rest = block.split(b"\n", skipped)[skipped]
            first += skipped
            texts = partial(texts_of_lines, rest, self.text_column, file.path, first + 1)
            position, fraction = Position(start.file, first), raw.tell() / max(1, file.bytes)
            yield RowChunk(position, row - first, len(rest), texts, fraction)

    def _has_column(self, file: SourceFile, block: bytes, row: int) -> bool:
        """Return False if a block's first megabyte is blank lines; UserError without the column."""
        columns: dict[str, None] = {}
        end = block.find(b"\n", _SEARCHED_BYTES) + 1 or len(block)
        for values in objects(block[:end], file.path, row + 1):
            if self.text_column in values:
                return True
            columns = columns or dict.fromkeys(values)
        if columns:
            raise missing_column(file.path, self.text_column, columns)
        return False

    def _row_groups(self, file: SourceFile, start: Position) -> Iterator[RowChunk]:
        metadata = self.read_metadata(file)
        columns = metadata.schema.to_arrow_schema().names
        if self.text_column not in columns:
            raise missing_column(file.path, self.text_column, columns)
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        firsts = list(itertools.accumulate(sizes, initial=0))
        groups = [group for group, size in enumerate(sizes) if firsts[group] + size > start.row]
        read = partial(self.read_row_group, file, metadata)
        largest = max((metadata.row_group(group).total_byte_size for group in groups), default=0)
        ahead = min(self.row_groups_ahead, max(1, _AHEAD_BYTES // max(1, largest)))
        tables = prefetch(read, groups, threads=ahead, max_pending=ahead)
        for group, table in zip(groups, tables, strict=True):
            column = table.column(0)
            mean_bytes = column.nbytes // max(1, len(column))
            step = max(1, min(_CHUNK_ROWS, _CHUNK_BYTES // max(1, mean_bytes)))
            for at in range(max(start.row - firsts[group], 0), len(column), step):
                rows = column[at : at + step]
                first = firsts[group] + at
                fraction = (first + len(rows)) / metadata.num_rows
                texts = partial(_column_texts, file, rows)
                yield RowChunk(Position(start.file, first), len(rows), rows.nbytes, texts, fraction)

    def read_metadata(self, file: SourceFile) -> pq.FileMetaData:
        """Read the footer of a parquet file."""
        with self.open(file) as raw:
            return pq.ParquetFile(raw).metadata

    def read_row_group(self, file: SourceFile, metadata: pq.FileMetaData, group: int) -> pa.Table:
        """Read the text column of one row group."""
        with self.open(file) as raw:
            parquet = pq.ParquetFile(raw, metadata=metadata, pre_buffer=True)
            return parquet.read_row_group(group, columns=[self.text_column])


@contextmanager
def file_errors(file: SourceFile) -> Iterator[None]:
    """Turn the exceptions that a damaged or missing file raises into errors that name it."""
    try:
        yield
    except _DAMAGE as error:
        raise _damaged(file, error) from error
    except pa.ArrowNotImplementedError as error:
        raise UserError(
            f"{file.path} cannot be read: {error}", "write it in another way, or leave it out"
        ) from error
    except OSError as error:
        # bz2 and Arrow raise a bare OSError for bad data; errors of the system have a number.
        if type(error) is OSError and error.errno is None:
            raise _damaged(file, error) from error
        if error.errno in (errno.ENOENT, errno.EIO, errno.ESTALE):
            raise UserError(
                f"{file.path} cannot be read: {error.strerror}", "bring it back, or leave it out"
            ) from error
        raise


def _column_texts(file: SourceFile, column: pa.ChunkedArray) -> pa.LargeStringArray:
    with file_errors(file):
        return arrow_texts(column, file.path)


def _decoded(content: bytes) -> tuple[str, bool]:
    """Return the text, and True if bytes had to be replaced."""
    try:
        return content.decode("utf-8-sig"), False
    except UnicodeDecodeError:
        return content.decode("utf-8-sig", "replace"), True


def _decompressed(raw: BinaryIO, name: str) -> BinaryIO:
    match PurePosixPath(name.lower()).suffix:
        case ".gz":
            return cast(BinaryIO, gzip.open(raw))
        case ".bz2":
            return cast(BinaryIO, bz2.open(raw))
        case ".xz":
            return cast(BinaryIO, lzma.open(raw))
        case ".zst":
            # Unlike zstandard's reader, Arrow's raises an error when the end is missing.
            return io.BufferedReader(pa.CompressedInputStream(raw, "zstd"))
        case _:
            return raw


def missing_column(place: str, column: str, columns: Iterable[str]) -> UserError:
    """Return the error for a file or dataset that has `columns`, but not the text column."""
    return UserError(
        f"{place} has no column {column!r}",
        f"set PREPARE_TEXT_COLUMN to one of: {', '.join(columns)}",
    )


def _damaged(file: SourceFile, error: Exception) -> UserError:
    return UserError(f"{file.path} is damaged: {error}", "replace it, or leave it out")


def kind_of(name: str) -> str | None:
    """Return the kind of text file from its name: .txt, .jsonl, …; None for any other file."""
    path = PurePosixPath(name.lower())
    if path.suffix in COMPRESSIONS and path.stem.endswith(".parquet"):
        return None  # Parquet compresses by itself; with more around it, no row group can be read.
    suffix = path.with_suffix("").suffix if path.suffix in COMPRESSIONS else path.suffix
    return suffix if suffix in KINDS else None


def listing(files: Iterable[SourceFile]) -> str:
    """Return the SHA-256 of names and sizes, in order: it changes with any of them."""
    return digest("".join(f"{file.name}\t{file.bytes}\n" for file in files))


def digest(text: str) -> str:
    """Return the SHA-256 of a text, which may be any file's name."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
