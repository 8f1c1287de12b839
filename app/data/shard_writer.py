"""Cuts a stream of encoded documents into shards: the held-out tokens first.

With each shard the manifest is committed, and in it the place in the source where the next one goes
on. A run that was killed begins there.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from app.data.batches import Batch, Position
from app.data.encoder import Lengths
from app.data.shards import Manifest, ShardInfo, Split, Tokens, shard_name, write_shard


@dataclass(frozen=True)
class Cursor:
    """Where the next shard begins.

    Attributes:
        file, row: position of its first document
        token: tokens of that document that earlier shards hold
        skipped: rows without text before it
        not_utf8: rows with replaced bytes before it
    """

    file: int = 0
    row: int = 0
    token: int = 0
    skipped: int = 0
    not_utf8: int = 0

    @property
    def position(self) -> Position:
        """Where to read on."""
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
        """How many documents begin with one of these tokens."""
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
        )


class ShardWriter:
    """Writes shards in a thread of its own, one while the next is filled.

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
        self._buffer = self._new_buffer()
        self._filled = self._documents = 0
        self._numbers = {
            split: sum(shard.split == split for shard in manifest.shards) for split in self.taken
        }
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._commit: Future[Manifest] | None = None

    @property
    def full(self) -> bool:
        """Whether all tokens that were asked for are taken."""
        return self._room() == 0

    def write(self, encoded: EncodedBatch) -> None:
        """Take the batch's tokens, as many as are wanted; `cursor` is then at its end."""
        at, self._skip = self._skip, 0
        while at < encoded.tokens.size and not self.full:
            split = self._split()
            take = min(
                self._buffer.size - self._filled,
                encoded.tokens.size - at,
                self._room() or encoded.tokens.size,
            )
            end = at + take
            self._buffer[self._filled : self._filled + take] = encoded.tokens[at:end]
            self._documents += encoded.documents(at, end)
            self._filled += take
            self.taken[split] += take
            at = end
            if split == "val" and self._split() == "train":
                at = encoded.next_document(at)
                self._flush(split, encoded.cursor(at, self.cursor))
            elif self._filled == self._buffer.size and not self.full:
                self._flush(split, encoded.cursor(at, self.cursor))
        self.cursor = encoded.counted(at, self.cursor) if self.full else encoded.end(self.cursor)

    def finish(self) -> Manifest:
        """Write what is left and the complete manifest."""
        if self._filled:
            self._flush(self._split(), self.cursor)
        self._wait()
        counts = {
            "documents": sum(shard.documents for shard in self.manifest.shards),
            "skipped": self.cursor.skipped,
            "not_utf8": self.cursor.not_utf8,
        }
        counts = {name: count for name, count in counts.items() if count or name == "documents"}
        self.manifest = replace(self.manifest, counts=counts, position=None, complete=True)
        self.manifest.save(self._folder)
        return self.manifest

    def _split(self) -> Split:
        return "val" if self.taken["val"] < self.held_out else "train"

    def _room(self) -> int | None:
        """How many tokens the split still takes; None for all there are."""
        split = self._split()
        limit = self.held_out if split == "val" else self.total
        return None if limit is None else limit - self.taken[split]

    def _new_buffer(self) -> Tokens:
        size = int(self.manifest.settings["shard_size"])
        room = self._room()
        return np.empty(size if room is None else max(1, min(size, room)), np.uint16)

    def _flush(self, split: Split, cursor: Cursor) -> None:
        self._wait()
        tokens, documents = self._buffer[: self._filled], self._documents
        number = self._numbers[split]
        self._commit = self._thread.submit(
            self._write_shard, split, number, tokens, documents, cursor
        )
        self._numbers[split] += 1
        self._filled = self._documents = 0
        self._buffer = self._new_buffer()

    def _write_shard(
        self, split: Split, number: int, tokens: Tokens, documents: int, cursor: Cursor
    ) -> Manifest:
        file = shard_name(self._name, split, number)
        info = ShardInfo(
            file, split, tokens.size, documents, write_shard(self._folder / file, tokens)
        )
        shards = (*self.manifest.shards, info)
        manifest = replace(self.manifest, shards=shards, position=asdict(cursor))
        manifest.save(self._folder)
        return manifest

    def _wait(self) -> None:
        if self._commit is not None:
            commit, self._commit = self._commit, None
            self.manifest = commit.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # What is being written is committed, also when the run is stopped.
        self._thread.shutdown(wait=True)
        if self._commit is not None and self._commit.exception() is None:
            self._wait()
