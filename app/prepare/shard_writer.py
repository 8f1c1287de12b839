"""Cuts a stream of encoded documents into shards: the held-out tokens first.

With each shard the manifest is committed, and in it the place in the source where the next one goes
on. A run that was killed begins there.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from app.data.manifest import Manifest, ShardInfo
from app.data.shards import ShardFile, Split, Tokens, shard_name
from app.errors import AppError, UserError
from app.prepare.documents import Batch, Position
from app.prepare.encoder import Lengths

_BATCHES_BEHIND = 8


@dataclass(frozen=True)
class Cursor:
    """The place where the next shard begins.

    Attributes:
        file, row: position of its first document
        token: tokens of that document that earlier shards hold
        skipped: rows without text before it
        not_utf8: rows with replaced bytes before it
        between: tokens of the document that the held-out ones end in, after them
    """

    file: int = 0
    row: int = 0
    token: int = 0
    skipped: int = 0
    not_utf8: int = 0
    between: int = 0

    @property
    def position(self) -> Position:
        """Return the position to read on from."""
        return Position(self.file, self.row)


class EncodedBatch:
    """A batch and its tokens.

    Args:
        tokens: uint16 [total]
        lengths: int64 [rows], tokens of each row
    """

    def __init__(self, batch: Batch, tokens: Tokens, lengths: Lengths) -> None:
        self.tokens = tokens
        self.fraction = batch.pieces[-1].fraction
        self._batch = batch
        self._starts = np.cumsum(lengths) - lengths
        self._is_empty = lengths == 0
        self._document_starts = self._starts[~self._is_empty]

    def next_document(self, at: int) -> int:
        """The token that the first document from token `at` on begins with."""
        following = np.searchsorted(self._document_starts, at)
        if following == self._document_starts.size:
            return self.tokens.size
        return int(self._document_starts[following])

    def documents(self, begin: int, end: int) -> int:
        """Return how many documents begin with one of these tokens."""
        return int(np.diff(np.searchsorted(self._document_starts, (begin, end)))[0])

    def cursor(self, at: int, before: Cursor) -> Cursor:
        """The cursor at token `at`, counting on from `before`, where the batch begins."""
        row = int(np.searchsorted(self._starts, at))
        token = 0
        is_start = row < self._starts.size and self._starts[row] == at
        if not is_start and at < self.tokens.size:
            row -= 1
            token = at - int(self._starts[row])
        return self._counted(row, token, row, before)

    def end(self, before: Cursor) -> Cursor:
        """The cursor after all rows."""
        return self._counted(self._starts.size, 0, self._starts.size, before)

    def counted(self, at: int, before: Cursor) -> Cursor:
        """The cursor at token `at`, its document counted, although it goes on."""
        cursor = self.cursor(at, before)
        row = int(np.searchsorted(self._starts, at))
        return self._counted(row, cursor.token, row, before) if cursor.token else cursor

    def _counted(self, row: int, token: int, rows: int, before: Cursor) -> Cursor:
        position = self._batch.position(row)
        return Cursor(
            *position,
            token,
            before.skipped + int(np.count_nonzero(self._is_empty[:rows])),
            before.not_utf8 + self._batch.not_utf8(rows),
            before.between,
        )


class ShardWriter:
    """Writes shards in a thread of its own, a few batches behind what it is given.

    Args:
        folder: of the dataset.
        name: what the shards' names begin with.
        manifest: what is written so far; it says how large shards are and how many tokens to take.
    """

    def __init__(self, folder: Path, name: str, manifest: Manifest) -> None:
        wanted = manifest.settings
        # One more than the held-out windows' inputs, so that the last of them has its last target.
        self.held_out = wanted["val_tokens"] + 1 if wanted["val_tokens"] else 0
        self.total = None if wanted["total_tokens"] == "all" else int(wanted["total_tokens"])
        self.manifest = manifest
        self.cursor = Cursor(**(manifest.position or {}))
        self.taken: dict[Split, int] = {
            "val": manifest.tokens("val"),
            "train": manifest.tokens("train"),
        }
        self._folder, self._name = folder, name
        self._skip = self.cursor.token
        self._size = self._filled = self._documents = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._tasks = deque[Future[None]]()
        # The thread's, while there are tasks, and so is the manifest.
        self._file: ShardFile | None = None

    @property
    def full(self) -> bool:
        """Return True if all tokens that were asked for are taken."""
        return self._room() == 0

    def write(self, encoded: EncodedBatch) -> None:
        """Take the batch's tokens, as many as are wanted; `cursor` is then at its end."""
        at, self._skip = self._skip, 0
        if at and at >= encoded.next_document(1):
            raise UserError(
                "the document that the last shard ends in is shorter than it was: "
                "the files have changed",
                "set PREPARE_OUT_DIR to another folder, or delete this one to prepare it anew",
            )
        while at < encoded.tokens.size and not self.full:
            split = self._split()
            if not self._filled:
                size, room = int(self.manifest.settings["shard_size"]), self._room()
                self._size = size if room is None else min(size, room)
            end = min(at + self._size - self._filled, encoded.tokens.size)
            self._do(self._append, split, self._size, encoded.tokens[at:end])
            self._documents += encoded.documents(at, end)
            self._filled += end - at
            self.taken[split] += end - at
            at = end
            if self._filled == self._size and not self.full:
                if self._split() != split:
                    held_out_end, at = at, encoded.next_document(at)
                    self.cursor = replace(self.cursor, between=at - held_out_end)
                self._flush(split, encoded.cursor(at, self.cursor))
        self.cursor = encoded.counted(at, self.cursor) if self.full else encoded.end(self.cursor)

    def finish(self) -> Manifest:
        """Write what is left and the complete manifest."""
        if self._filled:
            self._flush(self._split(), self.cursor)
        if self._tasks:
            self._tasks[-1].result()
        counts = {
            "documents": sum(shard.documents for shard in self.manifest.shards),
            "skipped": self.cursor.skipped,
            "not_utf8": self.cursor.not_utf8,
            "between": self.cursor.between,
        }
        counts = {name: count for name, count in counts.items() if count or name == "documents"}
        self.manifest = replace(self.manifest, counts=counts, position=None, complete=True)
        self.manifest.save(self._folder)
        return self.manifest

    def _split(self) -> Split:
        return "val" if self.taken["val"] < self.held_out else "train"

    def _room(self) -> int | None:
        """Return how many tokens the split still takes; None for all there are."""
        split = self._split()
        limit = self.held_out if split == "val" else self.total
        return None if limit is None else limit - self.taken[split]

    def _flush(self, split: Split, cursor: Cursor) -> None:
        self._do(self._commit, split, self._documents, cursor)
        self._filled = self._documents = 0

    def _do(self, task: Callable[..., None], *arguments: Any) -> None:
        before = self._tasks[-1] if self._tasks else None
        self._tasks.append(self._thread.submit(_after, before, task, *arguments))
        while self._tasks and (self._tasks[0].done() or len(self._tasks) > _BATCHES_BEHIND):
            self._tasks.popleft().result()

    def _append(self, split: Split, size: int, tokens: Tokens) -> None:
        if self._file is None:
            number = sum(shard.split == split for shard in self.manifest.shards)
            self._file = ShardFile(self._folder / shard_name(self._name, split, number), size)
        self._file.write(tokens)

    def _commit(self, split: Split, documents: int, cursor: Cursor) -> None:
        assert self._file is not None
        sha256 = self._file.commit()
        shard = ShardInfo(self._file.path.name, split, self._file.tokens, documents, sha256)
        self._file = None
        self.manifest = replace(
            self.manifest, shards=(*self.manifest.shards, shard), position=asdict(cursor)
        )
        self.manifest.save(self._folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Complete shards are committed, also when the run is stopped, even while it waits here.
        try:
            self._thread.shutdown(wait=True)
        finally:
            self._thread.shutdown(wait=True)
            if self._file is not None:
                self._file.__exit__(kind, error, trace)
        if isinstance(error, AppError) and self._tasks:
            # A disk that was full before matters more.
            self._tasks[-1].result()


def _after(before: Future[None] | None, task: Callable[..., None], *arguments: Any) -> None:
    """Do a task unless the one before has failed: nothing is to follow a torn write."""
    if before is not None:
        before.result()
    task(*arguments)
