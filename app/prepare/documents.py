"""The protocol of text sources: rows in a fixed order, readable from any position on."""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, Self

import pyarrow as pa

_BATCH_ROWS = 1024
_BATCH_BYTES = 4 << 20


class Position(NamedTuple):
    """A row of the source, counted within its file; rows without text count, too."""

    file: int
    row: int


@dataclass(frozen=True)
class Fault:
    """Why a row or a file is not text: `reason` follows its place, `fix` is what to do about it."""

    reason: str
    fix: str


class Texts(NamedTuple):
    """Parsed rows.

    Attributes:
        rows: large_string [rows], without nulls; an empty text is no document
        faults: the rows that are not text, in order; their text is empty
        replaced: the rows in which characters that have no UTF-8 were replaced, in order
    """

    rows: pa.LargeStringArray
    faults: Mapping[int, Fault] = {}
    replaced: Sequence[int] = ()


class Place(NamedTuple):
    """A source of rows: the path to open, its name within the source, and the kind of its rows."""

    path: str
    name: str
    row: str = "row"

    def of_row(self, path: str, row: int) -> str:
        """Return the place of a row for a message; lines are counted from 1, rows from 0."""
        return f"{path}, {self.row} {row + (self.row == 'line')}" if self.row else path


@dataclass(frozen=True)
class RowChunk:
    """Consecutive rows of one file, as one thread has read them.

    Attributes:
        first: position of the first row
        rows: number of rows
        bytes: size of their text, or of the input that it is parsed from
        texts: parses the rows, in any thread
        fraction: share of the source that is read after these rows, in [0, 1]; None if unknown
        place: the file
        digest: returns the hash of what the file holds before the chunk's `row`; see
            app.prepare.read_files
    """

    first: Position
    rows: int
    bytes: int
    texts: Callable[[], Texts]
    fraction: float | None
    place: Place
    digest: Callable[[int], str] = field(default=lambda _row: "", repr=False)

    @property
    def end(self) -> Position:
        """Return the position after the last row."""
        return Position(self.first.file, self.first.row + self.rows)

    @classmethod
    def parsed(cls, first: Position, texts: Texts, place: Place) -> Self:
        """Wrap texts that are parsed already."""
        return cls(first, len(texts.rows), texts.rows.nbytes, lambda: texts, None, place)

    @classmethod
    def faulty(cls, first: Position, fault: Fault, place: Place) -> Self:
        """Return the rest of a file that cannot be read, as one row."""
        texts = Texts(pa.array([""], pa.large_string()), {0: fault})
        return cls.parsed(first, texts, place._replace(row=""))


@dataclass(frozen=True)
class Batch:
    """Consecutive rows, of one file or of several."""

    chunks: Sequence[RowChunk]

    def texts(self) -> Texts:
        """Parse all chunks."""
        parts = [chunk.texts() for chunk in self.chunks]
        if len(parts) == 1:
            return parts[0]
        faults: dict[int, Fault] = {}
        replaced: list[int] = []
        first = 0
        for part in parts:
            faults.update({first + row: fault for row, fault in part.faults.items()})
            replaced += [first + row for row in part.replaced]
            first += len(part.rows)
        return Texts(pa.concat_arrays([part.rows for part in parts]), faults, replaced)

    def chunk_of(self, row: int) -> tuple[RowChunk, int]:
        """Return the chunk that holds the batch's `row`, or ends there, and the row's number in it.

        Args:
            row: up to the number of rows, which is the end of the batch.
        """
        *others, last = self.chunks
        for chunk in others:
            if row < chunk.rows:
                return chunk, row
            row -= chunk.rows
        return last, row


class Documents(Protocol):
    """A source of documents.

    Attributes:
        source: identifies the text, for the manifest; equal sources give equal documents
    """

    source: Mapping[str, Any]

    def chunks(self, start: Position) -> Generator[RowChunk]:
        """Yield all rows from `start` on, in order.

        What cannot be read as text is a row with a fault.

        Raises:
            UserError: the source has changed, or none of it can be read.
            NetworkError: the hub does not answer any more.
        """
        ...


def batches(chunks: Iterable[RowChunk]) -> Iterator[Batch]:
    """Gather chunks into batches that are large enough to be worth a thread's while.

    An exception of `chunks` is raised after the rows before it are yielded.
    """
    gathered: list[RowChunk] = []
    rows = size = 0
    try:
        for chunk in chunks:
            gathered.append(chunk)
            rows += chunk.rows
            size += chunk.bytes
            if rows >= _BATCH_ROWS or size >= _BATCH_BYTES:
                yield Batch(gathered)
                gathered, rows, size = [], 0, 0
    except Exception:
        if gathered:
            yield Batch(gathered)
        raise
    if gathered:
        yield Batch(gathered)
