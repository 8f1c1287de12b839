"""Cuts a stream of encoded documents into shards: the held-out tokens first.

The manifest is committed with each shard. It holds the place in the source where the next shard
begins, so that a run that was killed continues there.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, Self

from app.data.manifest import Manifest, ShardInfo
from app.data.shards import ShardFile, Split, Tokens, shard_name
from app.errors import UserError
from app.prepare.encoded_batch import Cursor, EncodedBatch
from app.prepare.held_out import Cut
from app.prepare.read_files import ReadFiles
from app.prepare.spec import DatasetSpec

Task = Callable[[], None]

MAX_LEFT_OUT = 100
# A share of fewer lines and files is too uncertain to stop early.
_MIN_ROWS = 1000


def check_bad(spec: DatasetSpec, bad: int, rows: int, left_out: Sequence[str]) -> None:
    """Raise UserError if `bad` of `rows` lines and files are more than `spec` allows."""
    if not spec.allows_bad(bad, rows):
        raise UserError(
            f"{bad:,} of {rows:,} lines and files are bad, more than PREPARE_SKIP_BAD allows; "
            f"the first one: {left_out[0]}",
            "correct them, or raise PREPARE_SKIP_BAD",
        )


class ShardWriter:
    """Cuts batches into tasks, and runs the tasks, which write and commit shards.

    Batches are cut in one thread, and tasks run in a second one, in order. Leaving the block
    waits for the running task; nothing is written after it.

    Args:
        folder: the dataset's folder.
        spec: what to write.
        manifest: the manifest to continue from.
        read_files: records the source's files, if they can change.
        cut: where held-out text ends, if in a document that is cut.

    Attributes:
        manifest: manifest of the committed shards; complete after finish()
        cursor: the place in the source after the batches that are cut
        taken: tokens of each split in these batches
    """

    def __init__(
        self,
        folder: Path,
        spec: DatasetSpec,
        manifest: Manifest,
        read_files: ReadFiles | None = None,
        cut: Cut | None = None,
    ) -> None:
        self.manifest = manifest
        self._cut = cut
        self.cursor = Cursor.load(manifest.position or {})
        self._read_files = read_files
        self._left_out = list(manifest.left_out)
        self.taken: dict[Split, int] = {
            "val": manifest.tokens("val"),
            "train": manifest.tokens("train"),
        }
        self._folder, self._spec = folder, spec
        self._skip = self.cursor.token
        # Documents that begin before `cursor`, and in the current shard.
        self._begun = sum(shard.documents for shard in manifest.shards)
        self._size = self._filled = self._documents = 0
        self._lock = Lock()
        self._is_writable = True
        self._file: ShardFile | None = None

    @property
    def full(self) -> bool:
        """Return True if all requested tokens are taken."""
        return self._room() == 0

    def cut(self, encoded: EncodedBatch) -> Iterator[Task]:
        """Take as many of the batch's tokens as are needed; yields the tasks that write them.

        Raises:
            UserError: the source has changed since earlier shards were written.
        """
        at, self._skip = self._skip, 0
        if at and not encoded.is_within_first_row(at):
            raise UserError(
                "the document that the last shard ends in is shorter than before: "
                "the files have changed",
                "set PREPARE_OUT_DIR to another folder, or delete this one to prepare it anew",
            )
        # A document that an earlier shard begins is counted there.
        end_of_good, refused = self._accept(encoded, self._rows() - bool(at))
        while at < end_of_good and not self.full:
            split = self._split()
            if not self._filled:
                size, room = self._spec.shard_size, self._room()
                self._size = size if room is None else min(size, room)
            end = min(at + self._size - self._filled, end_of_good)
            yield partial(self._append, split, self._size, encoded.tokens[at:end])
            documents = encoded.documents(at, end)
            self._documents += documents
            self._begun += documents
            self._filled += end - at
            self.taken[split] += end - at
            at = end
            if self._filled == self._size and not self.full:
                if self._split() != split:
                    held_out_end, at = at, encoded.next_document(at)
                    self.cursor = replace(self.cursor, between=at - held_out_end)
                yield self._end_shard(split, encoded.cursor_at(at, self.cursor))
        self.cursor = encoded.cursor_after(at, self.cursor, is_last=self.full)
        if refused and not self.full:
            raise refused

    def _accept(self, encoded: EncodedBatch, rows: int) -> tuple[int, UserError | None]:
        """Note the bad rows that are allowed, after `rows` rows of earlier batches.

        Returns:
            where the tokens before the first other bad row end, and its error.
        """
        for bad, (row, fault) in enumerate(encoded.faults.items(), self.cursor.bad + 1):
            if not self._spec.allows_bad(bad, max(rows + row + 1, _MIN_ROWS)):
                problem = f"{encoded.place(row, is_name=False)} {fault.reason}"
                if self._spec.skip_bad:
                    problem += f"; with it, {bad:,} are bad, more than PREPARE_SKIP_BAD allows"
                fix = f"{fault.fix}, or leave out bad lines and files with PREPARE_SKIP_BAD"
                return encoded.first_token(row), UserError(problem, fix)
            if bad <= MAX_LEFT_OUT:
                self._left_out.append(f"{encoded.place(row, is_name=True)} {fault.reason}")
        return encoded.tokens.size, None

    def run(self, task: Task) -> None:
        """Run a task; after one that fails, nothing more is written.

        Raises:
            OSError: the disk is full or fails.
        """
        with self._lock:
            if self._is_writable:
                self._is_writable = False
                task()
                self._is_writable = True

    def check_bad(self) -> None:
        """Raise UserError at the end of the source if too many of its lines and files are bad."""
        check_bad(self._spec, self.cursor.bad, self._rows(), self._left_out)

    def finish(self) -> Manifest:
        """Commit the last shard, and the manifest as complete."""
        if self._filled:
            self.run(self._end_shard(self._split(), self.cursor))
        if self._read_files:
            end = self.cursor.position if self.full else None
            self.run(partial(self._read_files.finish, end, self.cursor.digest()))
        counts = {
            "documents": self._begun,
            "skipped": self.cursor.skipped,
            "not_utf8": self.cursor.not_utf8,
            "between": self.cursor.between,
            "bad": self.cursor.bad,
        }
        counts = {name: count for name, count in counts.items() if count or name == "documents"}
        left_out = tuple(self._left_out[: self.cursor.bad])
        self.manifest = replace(
            self.manifest, counts=counts, left_out=left_out, position=None, complete=True
        )
        self.manifest.save(self._folder)
        return self.manifest

    def _rows(self) -> int:
        """Return how many rows come before `cursor`."""
        return self._begun + self.cursor.skipped + self.cursor.bad

    def _split(self) -> Split:
        return "val" if self.taken["val"] < self._spec.held_out_tokens else "train"

    def _room(self) -> int | None:
        """Return how many more tokens the current split takes; None for no limit."""
        split = self._split()
        limit = self._spec.held_out_tokens if split == "val" else self._spec.total_tokens
        return None if limit is None else limit - self.taken[split]

    def _end_shard(self, split: Split, cursor: Cursor) -> Task:
        commit = partial(self._commit, split, self._documents, cursor)
        self._filled = self._documents = 0
        return commit

    def _append(self, split: Split, size: int, tokens: Tokens) -> None:
        if self._file is None:
            number = sum(shard.split == split for shard in self.manifest.shards)
            self._file = ShardFile(self._folder / shard_name(self._spec.name, split, number), size)
        self._file.write(tokens)

    def _commit(self, split: Split, documents: int, cursor: Cursor) -> None:
        assert self._file is not None
        sha256 = self._file.commit()
        shard = ShardInfo(self._file.path.name, split, self._file.tokens, documents, sha256)
        self._file = None
        position: dict[str, Any] = cursor.to_json()
        if self._cut:
            position["cut"] = asdict(self._cut)
        if self._read_files:
            position["current"] = self._read_files.commit(cursor.position, cursor.digest())
        self.manifest = replace(
            self.manifest,
            shards=(*self.manifest.shards, shard),
            left_out=tuple(self._left_out[: cursor.bad]),
            position=position,
        )
        self.manifest.save(self._folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        # A signal may interrupt the wait for the running task: wait again.
        try:
            self._close(*error)
        finally:
            self._close(*error)

    def _close(self, *error: Any) -> None:
        with self._lock:
            self._is_writable = False
            if self._file:
                self._file.__exit__(*error)
                self._file = None
