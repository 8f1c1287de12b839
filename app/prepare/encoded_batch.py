"""Encoded rows, and the places in the source that their tokens come from."""

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import numpy as np

from app.data.shards import Tokens
from app.prepare.documents import Batch, Position, Texts
from app.prepare.encoder import Lengths


@dataclass(frozen=True)
class Cursor:
    """The place in the source where the next shard begins.

    Attributes:
        file, row: position of its first document
        token: how many of its tokens are already in earlier shards
        skipped: rows so far that had no text
        not_utf8: rows so far in which characters that have no UTF-8 were replaced
        between: tokens dropped between the splits: the tail of the document that the held-out split
            ends in
        bad: rows and files so far that could not be read as text
        digest: returns the hash of what was read of the file; see app.prepare.read_files
    """

    file: int = 0
    row: int = 0
    token: int = 0
    skipped: int = 0
    not_utf8: int = 0
    between: int = 0
    bad: int = 0
    digest: Callable[[], str] = field(default=lambda: "", compare=False, repr=False)

    @classmethod
    def load(cls, position: Mapping[str, Any]) -> Self:
        """Return the cursor that to_json() has stored."""
        digest = position.get("current", {}).get("digest", "")
        counters = {name: position[name] for name in _COUNTERS if name in position}
        return cls(**counters, digest=lambda: digest)

    def to_json(self) -> dict[str, int]:
        """Return the cursor for a manifest."""
        return {name: getattr(self, name) for name in _COUNTERS}

    @property
    def position(self) -> Position:
        """Return the position to continue reading from."""
        return Position(self.file, self.row)


_COUNTERS = ("file", "row", "token", "skipped", "not_utf8", "between", "bad")


class EncodedBatch:
    """A batch, its parsed texts, and their tokens.

    Args:
        tokens: uint16 [total].
        lengths: int64 [rows], number of tokens of each row.
        texts: the parsed rows.
        cut: the row that was encoded as two documents, and the tokens of the first.
    """

    def __init__(
        self,
        batch: Batch,
        tokens: Tokens,
        lengths: Lengths,
        texts: Texts,
        cut: tuple[int, int] | None = None,
    ) -> None:
        self.tokens, self.faults = tokens, texts.faults
        self.fraction = batch.chunks[-1].fraction
        self._batch, self._fault_rows, self._replaced = batch, [*texts.faults], texts.replaced
        self._starts = np.cumsum(lengths) - lengths
        self._is_empty = lengths == 0
        self._document_starts = self._starts[~self._is_empty]
        self._end_of_first = int(lengths[0]) if lengths.size else 0
        if cut:
            row, size = cut
            second = self._starts[row] + size
            self._document_starts = np.sort(np.append(self._document_starts, second))

    def next_document(self, at: int) -> int:
        """Return the first token of the first document that begins at token `at` or later."""
        following = np.searchsorted(self._document_starts, at)
        if following == self._document_starts.size:
            return self.tokens.size
        return int(self._document_starts[following])

    def is_within_first_row(self, at: int) -> bool:
        """Return True if token `at` belongs to the first row."""
        return at < self._end_of_first

    def documents(self, begin: int, end: int) -> int:
        """Return how many documents begin with one of the tokens [begin, end)."""
        return int(np.diff(np.searchsorted(self._document_starts, (begin, end)))[0])

    def cursor_at(self, at: int, before: Cursor) -> Cursor:
        """Return the cursor at token `at`; `before` is the cursor where the batch begins."""
        row = int(np.searchsorted(self._starts, at))
        is_start = row < self._starts.size and self._starts[row] == at
        if is_start or at == self.tokens.size:
            return self._cursor(row, 0, before)
        return self._cursor(row - 1, at - int(self._starts[row - 1]), before)

    def cursor_after(self, at: int, before: Cursor, *, is_last: bool) -> Cursor:
        """Return the cursor after all rows or, in the last batch, after those begun before `at`."""
        row = int(np.searchsorted(self._starts, at)) if is_last else self._starts.size
        return self._cursor(row, 0, before)

    def first_token(self, row: int) -> int:
        """Return the first token of a row."""
        return int(self._starts[row])

    def place(self, row: int, *, is_name: bool) -> str:
        """Return the place of a row: its path, or its name within the source."""
        chunk, row = self._batch.chunk_of(row)
        path = chunk.place.name if is_name else chunk.place.path
        return chunk.place.of_row(path, chunk.first.row + row)

    def _cursor(self, row: int, token: int, before: Cursor) -> Cursor:
        chunk, chunk_row = self._batch.chunk_of(row)
        bad = bisect_left(self._fault_rows, row)
        return Cursor(
            chunk.first.file,
            chunk.first.row + chunk_row,
            token,
            before.skipped + int(np.count_nonzero(self._is_empty[:row])) - bad,
            before.not_utf8 + bisect_left(self._replaced, row),
            before.between,
            before.bad + bad,
            partial(chunk.digest, chunk_row),
        )
