"""Tasks: ranges of the source, in the order of the single-machine run.

Ranges end between two files, or between two row groups of a parquet file.
"""

import os
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from app.files import read_json, write_json
from app.prefetch import prefetch
from app.prepare.documents import Documents, Position, RowChunk
from app.prepare.local_files import FileDocuments, damage_named, kind_of
from app.prepare.sources import TextSource, open_documents

if TYPE_CHECKING:
    from app.prepare.hub import StreamedDocuments

_FOOTERS_AHEAD = 8
# Their sizes are not known.
_STREAMED_FILE_BYTES = 256 << 20
BEGIN = Position(0, 0)
PLAN = "plan.json"


def open_here(source: TextSource) -> Documents:
    """Find the documents of a source on this machine.

    The hub's token is not in a source, which may be stored: each machine has one in HF_TOKEN, or in
    huggingface_hub's file.
    """
    return open_documents(source, os.environ.get("HF_TOKEN"))


class Task(NamedTuple):
    """The rows from `start` on, up to `end`; (file, 0) is also the end of the file before.

    `text_bytes` says about how much text they have.
    """

    start: Position
    end: Position
    text_bytes: int

    def pieces(self, documents: Documents) -> Generator[RowChunk]:
        """Its rows, in order; see app.prepare.documents.Documents."""
        if not isinstance(documents, FileDocuments):
            rows = _streamed(documents).rows
            for file in range(self.start.file, self.end.file):
                one = rows.shard(rows.num_shards, file)
                yield from replace(_streamed(documents), rows=one).pieces(BEGIN)
            return
        # Nothing after its last file is read ahead.
        files = documents.files[: self.end.file + bool(self.end.row)]
        with closing(replace(documents, files=files).pieces(self.start)) as found:
            for piece in found:
                yield piece
                if piece.end >= self.end:
                    return


@dataclass(frozen=True)
class Plan:
    """The tasks of a dataset, stored beside their parts; more may be added at the end.

    Attributes:
        key: of this plan alone, so that what was begun for another one is never taken for its part
        name: what the shards' names begin with
        tasks: the first one begins with the source
    """

    key: str
    name: str
    tasks: tuple[Task, ...] = ()

    @property
    def end(self) -> Position:
        """Return how far into the source the tasks go."""
        return self.tasks[-1].end if self.tasks else BEGIN

    @classmethod
    def load(cls, folder: Path) -> "Plan | None":
        """The plan in `folder`; None if there is none."""
        if not (folder / PLAN).exists():
            return None
        stored = read_json(folder / PLAN, "delete the dataset's folder, and prepare it again")
        tasks = (Task(Position(*start), Position(*end), n) for start, end, n in stored["tasks"])
        return cls(stored["key"], stored["name"], tuple(tasks))

    def save(self, folder: Path) -> None:
        """Store it, at once or not at all."""
        write_json(folder / PLAN, {"key": self.key, "name": self.name, "tasks": self.tasks})


def end_of(documents: Documents) -> Position:
    """The position after all rows."""
    if isinstance(documents, FileDocuments):
        return Position(len(documents.files), 0)
    return Position(_streamed(documents).rows.num_shards, 0)


def plan(
    documents: Documents, start: Position, *, text_bytes: float, task_bytes: float
) -> Iterator[Task]:
    """Cut the source, from `start` on, into tasks.

    Args:
        text_bytes: stop after so much text.
        task_bytes: of text that a task has at least, but for the last one.
    """
    planned, size, end = 0, 0, start
    for end, unit_bytes in _units(documents, start):
        size += unit_bytes
        if size >= task_bytes or planned + size >= text_bytes:
            yield Task(start, end, size)
            start, planned, size = end, planned + size, 0
            if planned >= text_bytes:
                return
    if end > start:
        yield Task(start, end, size)


def _units(documents: Documents, after: Position) -> Iterator[tuple[Position, int]]:
    """Yield the end of each file or row group from `after` on, with its rough size."""
    if not isinstance(documents, FileDocuments):
        for file in range(after.file, _streamed(documents).rows.num_shards):
            yield Position(file + 1, 0), _STREAMED_FILE_BYTES
        return

    def row_groups(file: int) -> list[tuple[Position, int]]:
        one = documents.files[file]
        if kind_of(one.name) != ".parquet":
            return [(Position(file + 1, 0), one.bytes)]
        with damage_named(one):
            metadata = documents.read_metadata(one)
        groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
        row, units = 0, []
        for group in groups:
            row += group.num_rows
            end = Position(file, row) if row < metadata.num_rows else Position(file + 1, 0)
            units.append((end, group.total_byte_size))
        return units or [(Position(file + 1, 0), 0)]

    files = range(after.file, len(documents.files))
    for units in prefetch(row_groups, files, threads=_FOOTERS_AHEAD, max_pending=_FOOTERS_AHEAD):
        yield from (unit for unit in units if unit[0] > after)


def _streamed(documents: Documents) -> "StreamedDocuments":
    # The hub's libraries take a second to import; local text does not need them.
    from app.prepare.hub import StreamedDocuments

    assert isinstance(documents, StreamedDocuments)
    return documents
