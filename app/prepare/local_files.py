"""Documents in files, local or on the hub: plain text, JSON lines, parquet.

Parquet is read a row group at a time: only the text column, and nothing twice.
"""

import errno
import gzip
import io
import itertools
import lzma
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
import zstandard
from fsspec import AbstractFileSystem

from app.dataset_names import COMPRESSIONS, kind_of
from app.prefetch import prefetch
from app.prepare.documents import Fault, Place, Position, RowChunk
from app.prepare.json_lines import line_blocks, may_have_key, objects
from app.prepare.listing import SourceFile
from app.prepare.text_blocks import DocumentBlock, LineBlock, chunks_of_blocks, document_blocks
from app.prepare.text_streams import BadFileError, text_stream
from app.prepare.texts import NO_TEXT_FIX, arrow_texts, is_text

_CHUNK_BYTES = 4 << 20
_CHUNK_ROWS = 1024
_AHEAD_BYTES = 64 << 20
_UNREADABLE = (errno.ENOENT, errno.ELOOP, errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM)
_DAMAGE = (
    EOFError,
    gzip.BadGzipFile,
    lzma.LZMAError,
    zlib.error,
    zstandard.ZstdError,
    pa.ArrowInvalid,
)


@dataclass
class FileDocuments:
    """Documents in files of one file system, in the order of `files`.

    Attributes:
        files: the files
        text_column: the text's name in JSON lines and parquet files
        source: see app.prepare.documents.Documents
        encoding: of text files; see app.prepare.text_streams.text_stream
        filesystem: the hub's; None for local files
        row_groups_ahead: number of a parquet file's row groups that are read in advance
        own: folders of the source that this program has written, which hold no text
        digests: of each file that was read to its end, by index
    """

    files: list[SourceFile]
    text_column: str
    source: Mapping[str, Any]
    encoding: str = ""
    filesystem: AbstractFileSystem | None = None
    row_groups_ahead: int = 4
    own: Sequence[str] = ()
    digests: dict[int, str] = field(default_factory=dict, init=False, repr=False)

    def chunks(self, start: Position) -> Generator[RowChunk]:
        """Yield all rows from `start` on; see app.prepare.documents.Documents.

        The rest of a file that cannot be read is one row with a fault.
        """
        total_bytes = sum(file.bytes for file in self.files) or 1
        done_bytes = sum(file.bytes for file in self.files[: start.file])
        for index, file in enumerate(self.files[start.file :], start.file):
            first = Position(index, start.row if index == start.file else 0)
            last = None
            for chunk in self._chunks_of_file(first):
                done = (done_bytes + (chunk.fraction or 0.0) * file.bytes) / total_bytes
                yield replace(chunk, fraction=done)
                last = chunk
            if last:
                self.digests[index] = last.digest(last.rows)
            done_bytes += file.bytes

    def digest(self, index: int, rows: int | None) -> str:
        """Return the digest of a file's first rows, or of all; empty if it has fewer."""
        if kind_of(self.files[index].name) == ".parquet":
            return self._footer_digest(self.files[index])
        digest = xxhash.xxh3_128().hexdigest()
        for chunk in self._chunks_of_file(Position(index, 0)):
            if rows is not None and chunk.end.row >= rows:
                return chunk.digest(rows - chunk.first.row)
            digest = chunk.digest(chunk.rows)
        return digest if rows is None else ""

    def _chunks_of_file(self, start: Position) -> Iterator[RowChunk]:
        """Yield the rows of one file from `start` on; fractions are of the file."""
        file, end = self.files[start.file], start
        try:
            for chunk in self._read(file, start):
                yield chunk
                end = chunk.end
        except Exception as error:
            fault = file_fault(error)
            if fault is None:
                raise
            yield RowChunk.faulty(end, fault, Place(file.path, file.name))

    def _read(self, file: SourceFile, start: Position) -> Iterator[RowChunk]:
        match kind_of(file.name):
            case ".parquet":
                yield from self._row_groups(file, start)
            case kind:
                if not file.bytes and file.name.lower().endswith(COMPRESSIONS):
                    raise EOFError("it is empty")
                with self.open(file) as raw:
                    stream = text_stream(raw, file.name, self.encoding)
                    blocks: Iterator[LineBlock] | Iterator[DocumentBlock] = (
                        self._lines(file, stream)
                        if kind == ".jsonl"
                        else document_blocks(kind, stream)
                    )
                    yield from chunks_of_blocks(file, raw, blocks, start)

    def open(self, file: SourceFile) -> BinaryIO:
        """Open a file of the source for reading."""
        if self.filesystem is None:
            return cast(BinaryIO, io.FileIO(file.path))
        return cast(BinaryIO, self.filesystem.open(file.path, "rb", cache_type="none"))

    def _lines(self, file: SourceFile, stream: io.BufferedIOBase) -> Iterator[LineBlock]:
        has_column = False
        for lines in line_blocks(stream):
            if not has_column:
                self._check_column(file, lines)
                has_column = True
            yield LineBlock(lines, self.text_column)

    def _check_column(self, file: SourceFile, block: bytes) -> None:
        """Raise BadFileError if no line has the column; looks into the next blocks if necessary."""
        if block.lstrip()[:1] == b"[":
            fix = "convert it to JSON lines: `jq -c '.[]' FILE > FILE.jsonl`"
            raise BadFileError(Fault("is a JSON array, not one JSON object a line", fix))
        columns: dict[str, Any] = {}
        with self.open(file) as raw:
            stream = text_stream(raw, file.name, self.encoding)
            for part in itertools.chain([block], line_blocks(stream)):
                if columns and not may_have_key(part, self.text_column):
                    continue
                for values in objects(part):
                    if isinstance(values, Fault):
                        # Its chunk reports it.
                        return
                    if self.text_column in values:
                        return
                    columns = columns or values
        if columns:
            raise BadFileError(missing_column(self.text_column, columns))

    def _row_groups(self, file: SourceFile, start: Position) -> Iterator[RowChunk]:
        metadata = self.read_metadata(file)
        schema = metadata.schema.to_arrow_schema()
        count = schema.names.count(self.text_column)
        if count == 0:
            raise BadFileError(missing_column(self.text_column, schema.names))
        if count > 1:
            fix = "rename all but one of them, or set PREPARE_TEXT_COLUMN to another column"
            raise BadFileError(Fault(f"has {count} columns {self.text_column!r}", fix))
        kind = schema.field(self.text_column).type
        if not is_text(kind):
            reason = f"has {kind}, not text, in its column {self.text_column!r}"
            raise BadFileError(Fault(reason, NO_TEXT_FIX))
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        firsts = list(itertools.accumulate(sizes, initial=0))
        groups = [group for group, size in enumerate(sizes) if firsts[group] + size > start.row]
        read = partial(self.read_row_group, file, metadata)
        largest = max((metadata.row_group(group).total_byte_size for group in groups), default=0)
        ahead = min(self.row_groups_ahead, max(1, _AHEAD_BYTES // max(1, largest)))
        tables = prefetch(read, groups, threads=ahead, max_pending=ahead)
        place = Place(file.path, file.name)
        digest = self._footer_digest(file)
        for group, table in zip(groups, tables, strict=True):
            column = table.column(0)
            mean_bytes = column.nbytes // max(1, len(column))
            step = max(1, min(_CHUNK_ROWS, _CHUNK_BYTES // max(1, mean_bytes)))
            for at in range(max(start.row - firsts[group], 0), len(column), step):
                rows = column[at : at + step]
                first = Position(start.file, firsts[group] + at)
                fraction = (first.row + len(rows)) / metadata.num_rows
                texts = partial(arrow_texts, rows)
                yield RowChunk(
                    first, len(rows), rows.nbytes, texts, fraction, place, lambda _row: digest
                )

    def _footer_digest(self, file: SourceFile) -> str:
        """Return the hash of a parquet file's footer, which has its columns' sizes and extremes."""
        if self.filesystem is not None:
            return ""
        with self.open(file) as raw:
            raw.seek(-8, io.SEEK_END)
            size = int.from_bytes(raw.read(4), "little")
            raw.seek(-8 - size, io.SEEK_END)
            return xxhash.xxh3_128(raw.read(size)).hexdigest()

    def read_metadata(self, file: SourceFile) -> pq.FileMetaData:
        """Read the footer of a parquet file."""
        with self.open(file) as raw:
            return pq.ParquetFile(raw).metadata

    def read_row_group(self, file: SourceFile, metadata: pq.FileMetaData, group: int) -> pa.Table:
        """Read the text column of one row group."""
        with self.open(file) as raw:
            parquet = pq.ParquetFile(raw, metadata=metadata, pre_buffer=True)
            return parquet.read_row_group(group, columns=[self.text_column])


def file_fault(error: Exception) -> Fault | None:
    """Return why a file cannot be read; None if the file is not at fault."""
    if isinstance(error, BadFileError):
        return error.fault
    if isinstance(error, UnicodeError):
        return Fault(
            f"cannot be decoded: {error}",
            "convert it to UTF-8, or set PREPARE_ENCODING to the encoding of the text",
        )
    if isinstance(error, pa.ArrowNotImplementedError):
        return Fault(f"cannot be read: {error}", "write it in another way, or remove it")
    if isinstance(error, OSError) and error.errno in _UNREADABLE:
        return Fault(f"cannot be read: {error.strerror}", "make it readable, or remove it")
    # bz2 and Arrow raise a bare OSError for bad data; errors of the system have a number.
    if isinstance(error, _DAMAGE) or (type(error) is OSError and error.errno is None):
        return Fault(f"is damaged: {error}", "replace it, or remove it")
    return None


def missing_column(column: str, columns: Iterable[str]) -> Fault:
    """Return the fault of a file or dataset that has `columns`, but not the text column."""
    return Fault(
        f"has no column {column!r}", f"set PREPARE_TEXT_COLUMN to one of: {', '.join(columns)}"
    )
