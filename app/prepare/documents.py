"""The protocol of text sources: rows in a fixed order, from any position on."""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import numpy.typing as npt
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
        rows: how many
        bytes: of their text, or of what it is parsed from
        texts: parses them, in any thread: large_string [rows], without nulls; an empty one is no
            document; it raises UserError for rows that are no text
        fraction: how much of the source is read after them, in [0, 1]; None if unknown
        not_utf8: whether bytes had to be replaced
    """

    first: Position
    rows: int
    bytes: int
    texts: Callable[[], pa.LargeStringArray]
    fraction: float | None
    not_utf8: bool = False

    @property
    def end(self) -> Position:
        """The position after its last row."""
        return Position(self.first.file, self.first.row + self.rows)

    @classmethod
    def parsed(cls, first: Position, texts: pa.LargeStringArray, fraction: float | None) -> Self:
        """Make a piece of texts that are there already."""
        return cls(first, len(texts), texts.nbytes, lambda: texts, fraction)


@dataclass(frozen=True)
class Batch:
    """Consecutive rows, of one file or of several."""

    pieces: Sequence[RowChunk]

    def texts(self) -> pa.LargeStringArray:
        """Parse all pieces: large_string [rows]."""
        first, *others = (piece.texts() for piece in self.pieces)
        return pa.concat_arrays([first, *others]) if others else first

    def position(self, row: int) -> Position:
        """Return the position in the source of the batch's `row`, or of its end."""
        for piece in self.pieces:
            if row < piece.rows:
                return Position(piece.first.file, piece.first.row + row)
            row -= piece.rows
        end = self.pieces[-1].end
        return Position(end.file, end.row + row)

    def not_utf8(self, rows: int) -> int:
        """Return how many of the first `rows` rows had bytes replaced."""
        starts = np.cumsum([0, *(piece.rows for piece in self.pieces)])
        return sum(
            piece.not_utf8
            for piece, start in zip(self.pieces, starts[:-1], strict=True)
            if start < rows
        )


class Documents(Protocol):
    """A source of documents.

    Attributes:
        source: what identifies the text, for the manifest; equal sources give equal documents
    """

    source: Mapping[str, Any]

    def pieces(self, start: Position) -> Generator[RowChunk]:
        """All rows from `start` on, in order.

        Raises:
            UserError: a file or column that cannot be read as text.
            NetworkError: the hub does not answer any more.
        """
        ...


def batches(pieces: Iterable[RowChunk]) -> Iterator[Batch]:
    """Gather pieces into batches of a size that is worth a thread's while.

    A failure of `pieces` comes after the rows before it.
    """
    gathered: list[RowChunk] = []
    rows = size = 0
    try:
        for piece in pieces:
            gathered.append(piece)
            rows += piece.rows
            size += piece.bytes
            if rows >= _BATCH_ROWS or size >= _BATCH_BYTES:
                yield Batch(gathered)
                gathered, rows, size = [], 0, 0
    except Exception:
        if gathered:
            yield Batch(gathered)
        raise
    if gathered:
        yield Batch(gathered)


def text_bytes(texts: pa.LargeStringArray) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """Offsets, int64 [rows + 1], into the UTF-8 bytes of `texts`; neither is copied."""
    _, offsets, data = texts.buffers()
    ends = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    return ends, np.frombuffer(data, np.uint8) if data else np.empty(0, np.uint8)
