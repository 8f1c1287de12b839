"""Documents in files, here or on the hub: plain text, JSON lines, parquet.

Parquet is read a row group at a time through a file system, which reads only the text column and
nothing twice.
"""

import bz2
import errno
import gzip
import hashlib
import io
import itertools
import json
import lzma
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from app.data.ahead import ahead
from app.data.batches import Piece, Position
from app.errors import UserError

KINDS = (".txt", ".md", ".py", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_PIECE_BYTES = 4 << 20
_LINES_BYTES = 1 << 20
_PIECE_ROWS = 1024
_AHEAD_BYTES = 64 << 20
# Position of the first row, texts, fraction of the file that is read, whether bytes were replaced.
_Rows = tuple[int, pa.LargeStringArray, float, bool]
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
    row_groups_ahead: int = 2

    def pieces(self, start: Position) -> Generator[Piece]:
        """All rows from `start` on, in order; see app.data.batches.Documents."""
        total_bytes = sum(file.bytes for file in self.files) or 1
        done_bytes = sum(file.bytes for file in self.files[: start.file])
        for index, file in enumerate(self.files[start.file :], start.file):
            first_row = start.row if index == start.file else 0
            with damage_named(file):
                for row, texts, fraction, not_utf8 in self._read(file, first_row):
                    done = (done_bytes + fraction * file.bytes) / total_bytes
                    yield Piece(Position(index, row), texts, done, not_utf8)
            done_bytes += file.bytes

    def _read(self, file: SourceFile, first_row: int) -> Iterator[_Rows]:
        match kind_of(file.name):
            case ".parquet":
                yield from self._row_groups(file, first_row)
            case ".jsonl":
                with self.open(file) as raw:
                    yield from self._lines(file, raw, first_row)
            case _ if first_row == 0:
                with self.open(file) as raw:
                    content = _decompressed(raw, file.name).read()
                text, not_utf8 = _decoded(content)
                yield 0, as_texts([text], file.path), 1.0, not_utf8

    def open(self, file: SourceFile) -> BinaryIO:
        """Open a file of the source for reading."""
        return cast(BinaryIO, self.filesystem.open(file.path, "rb", cache_type="none"))

    def _lines(self, file: SourceFile, raw: BinaryIO, first_row: int) -> Iterator[_Rows]:
        row = 0
        has_column = False
        lines = _decompressed(raw, file.name)
        while piece := lines.readlines(_LINES_BYTES):
            first, row = row, row + len(piece)
            if row <= first_row:
                continue
            skipped = max(first_row - first, 0)
            rows = [
                _json_object(line, f"{file.path}, line {number}") if line.strip() else {}
                for number, line in enumerate(piece[skipped:], start=first + skipped + 1)
            ]
            filled = [one for one in rows if one]
            if filled and not has_column and first_row == 0:
                if not any(self.text_column in one for one in filled):
                    raise _no_column(file, self.text_column, filled[0])
                has_column = True
            values = [one.get(self.text_column) for one in rows]
            texts = as_texts(values, f"{file.path}, line", first + skipped + 1)
            yield first + skipped, texts, raw.tell() / max(1, file.bytes), False

    def _row_groups(self, file: SourceFile, first_row: int) -> Iterator[_Rows]:
        metadata = self.read_metadata(file)
        columns = metadata.schema.to_arrow_schema().names
        if self.text_column not in columns:
            raise _no_column(file, self.text_column, columns)
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        firsts = list(itertools.accumulate(sizes, initial=0))
        wanted = [group for group, size in enumerate(sizes) if firsts[group] + size > first_row]
        read = partial(self.read_row_group, file, metadata)
        largest = max((metadata.row_group(group).total_byte_size for group in wanted), default=0)
        count = min(self.row_groups_ahead, max(1, _AHEAD_BYTES // max(1, largest)))
        tables = ahead(read, wanted, threads=count, waiting=count)
        for group, table in zip(wanted, tables, strict=True):
            column = table.column(0)
            mean_bytes = column.nbytes // max(1, len(column))
            step = max(1, min(_PIECE_ROWS, _PIECE_BYTES // max(1, mean_bytes)))
            for at in range(0, len(column), step):
                row = firsts[group] + at
                rows = column[at : at + step]
                if row + len(rows) <= first_row:
                    continue
                skipped = max(first_row - row, 0)
                fraction = (row + len(rows)) / metadata.num_rows
                yield row + skipped, arrow_texts(rows[skipped:], file.path), fraction, False

    def read_metadata(self, file: SourceFile) -> pq.FileMetaData:
        """The footer of a parquet file."""
        with self.open(file) as raw:
            return pq.ParquetFile(raw).metadata

    def read_row_group(self, file: SourceFile, metadata: pq.FileMetaData, group: int) -> pa.Table:
        """The text column of one row group."""
        with self.open(file) as raw:
            parquet = pq.ParquetFile(raw, metadata=metadata, pre_buffer=True)
            return parquet.read_row_group(group, columns=[self.text_column])


@contextmanager
def damage_named(file: SourceFile) -> Iterator[None]:
    """Turn what a damaged file raises into an error that names it."""
    try:
        yield
    except _DAMAGE as error:
        raise _damaged(file, error) from error
    except pa.ArrowNotImplementedError as error:
        raise UserError(
            f"{file.path} cannot be read: {error}", "write it in another way, or leave it out"
        ) from error
    except OSError as error:
        # bz2 and Arrow raise the bare class for bad data; the system's errors have numbers.
        if type(error) is OSError and error.errno is None:
            raise _damaged(file, error) from error
        if error.errno in (errno.ENOENT, errno.EIO, errno.ESTALE):
            raise UserError(
                f"{file.path} cannot be read: {error.strerror}", "bring it back, or leave it out"
            ) from error
        raise


def as_texts(values: Sequence[object], place: str, first: int = 0) -> pa.LargeStringArray:
    """Python values as texts; None is an empty one.

    Raises:
        UserError: a value is not text; it names `place` and the value's number, from `first` on.
    """
    for number, value in enumerate(values, first):
        if value is not None and not isinstance(value, str):
            raise _not_text(type(value).__name__, f"{place} {number}: {value!r:.80}")
    try:
        return pa.array(["" if value is None else value for value in values], pa.large_string())
    except UnicodeEncodeError:
        # JSON can spell half a surrogate pair, which has no UTF-8; tiktoken replaces it like this.
        whole = [
            ""
            if value is None
            else str(value).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            for value in values
        ]
        return pa.array(whole, pa.large_string())


def arrow_texts(column: pa.ChunkedArray, place: str) -> pa.LargeStringArray:
    """A column as texts; a null is an empty one.

    Raises:
        UserError: the column does not hold text; it names `place`.
        ArrowInvalid: its bytes are not UTF-8.
    """
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_null(kind):
        return pa.array([""] * len(column), pa.large_string())
    if not (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    ):
        raise _not_text(str(kind), place)
    column = column.cast(pa.large_string())
    if column.null_count:
        column = column.fill_null("")
    texts = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    texts.validate(full=True)
    return texts


def _not_text(kind: str, place: str) -> UserError:
    return UserError(
        f"the text column holds {kind}, not text ({place})",
        "set PREPARE_TEXT_COLUMN to the column that holds the text",
    )


def _decoded(content: bytes) -> tuple[str, bool]:
    """The text, and whether bytes had to be replaced."""
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
            # Unlike zstandard's reader, Arrow's says so when the end is missing.
            return io.BufferedReader(pa.CompressedInputStream(raw, "zstd"))
        case _:
            return raw


def _json_object(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
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
