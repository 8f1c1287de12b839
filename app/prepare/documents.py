"""The protocol of text sources: rows in a fixed order, readable from any position on."""

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self

import pyarrow as pa

_BATCH_ROWS = 1024
_BATCH_BYTES = 4 << 20


class Position(NamedTuple):
    """A row of the source, counted within its file; rows without text count, too."""

    file: int
    row: int


@dataclass(frozen=True)
class RowChunk:
    """Consecutive rows of one file, as one thread has read them.

    Attributes:
        first: position of the first row
        rows: number of rows
        bytes: size of their text, or of the input that it is parsed from
        texts: parses the rows, in any thread: large_string [rows], without nulls; an empty text is
            no document; raises UserError for rows that are not text
        fraction: share of the source that is read after these rows, in [0, 1]; None if unknown
        not_utf8: True if bytes had to be replaced
    """

    first: Position
    rows: int
    bytes: int
    texts: Callable[[], pa.LargeStringArray]
    fraction: float | None
    not_utf8: bool = False

    @property
    def end(self) -> Position:
        """Return the position after the last row."""
        return Position(self.first.file, self.first.row + self.rows)

    @classmethod
    def parsed(cls, first: Position, texts: pa.LargeStringArray) -> Self:
        """Wrap texts that are parsed already."""
        return cls(first, len(texts), texts.nbytes, lambda: texts, None)


@dataclass(frozen=True)
class Batch:
    """Consecutive rows, of one file or of several."""

    chunks: Sequence[RowChunk]

    def texts(self) -> pa.LargeStringArray:
        """Parse all chunks: large_string [rows]."""
        first, *others = (chunk.texts() for chunk in self.chunks)
        return pa.concat_arrays([first, *others]) if others else first

    def position(self, row: int) -> Position:
        """Return the position in the source of the batch's `row`, or of its end."""
        for chunk in self.chunks:
            if row < chunk.rows:
                return Position(chunk.first.file, chunk.first.row + row)
            row -= chunk.rows
        end = self.chunks[-1].end
        return Position(end.file, end.row + row)

    def not_utf8(self, rows: int) -> int:
        """Return how many of the first `rows` rows had bytes replaced."""
        starts = itertools.accumulate((chunk.rows for chunk in self.chunks), initial=0)
        return sum(
            chunk.not_utf8
            for chunk, start in zip(self.chunks, starts, strict=False)
            if start < rows
        )


class Documents(Protocol):
    """A source of documents.

    Attributes:
        source: identifies the text, for the manifest; equal sources give equal documents
    """

    source: Mapping[str, Any]

    def chunks(self, start: Position) -> Generator[RowChunk]:
        """Yield all rows from `start` on, in order.

        Raises:
            UserError: a file or column cannot be read as text.
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
