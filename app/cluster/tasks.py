"""Tasks: ranges of the source, in the order of the single-machine run.

A range ends between two files, or between two row groups of a parquet file.
"""

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from app.dataset_names import kind_of
from app.files import read_json, write_json
from app.prefetch import prefetch
from app.prepare.documents import Documents, Position, RowChunk
from app.prepare.held_out import Cut
from app.prepare.local_files import FileDocuments, file_fault

if TYPE_CHECKING:
    from app.prepare.hub import StreamedDocuments

_FOOTERS_AHEAD = 8
# The sizes of streamed files are not known.
_STREAMED_FILE_BYTES = 256 << 20
BEGIN = Position(0, 0)
PLAN = "plan.json"


class Task(NamedTuple):
    """The rows from `start` up to `end`. An end of (file, 0) means the end of the previous file.

    `text_bytes` is the rough size of their text.
    """

    start: Position
    end: Position
    text_bytes: int

    def chunks(self, documents: Documents) -> Generator[RowChunk]:
        """Yield the task's rows; see app.prepare.documents.Documents."""
        if not isinstance(documents, FileDocuments):
            rows = _streamed(documents).rows
            for file in range(self.start.file, self.end.file):
                shard = rows.shard(rows.num_shards, file)
                yield from replace(_streamed(documents), rows=shard).chunks(BEGIN)
            return
        # Files after the task's last one are not read ahead.
        files = documents.files[: self.end.file + bool(self.end.row)]
        with closing(replace(documents, files=files).chunks(self.start)) as chunks:
            for chunk in chunks:
                yield chunk
                if chunk.end >= self.end:
                    return


@dataclass(frozen=True)
class Plan:
    """The tasks of a dataset, stored beside their parts; more may be added at the end.

    Attributes:
        key: identifies the plan, so that a part of a different plan is never mistaken for its own
        name: the beginning of the shards' names
        tasks: the first begins where the source does
        cut: where held-out text ends, if in a document that is cut
    """

    key: str
    name: str
    tasks: tuple[Task, ...] = ()
    cut: Cut | None = None

    @property
    def end(self) -> Position:
        """Return the position in the source where the tasks end."""
        return self.tasks[-1].end if self.tasks else BEGIN

    @classmethod
    def load(cls, folder: Path) -> "Plan | None":
        """Read the plan in `folder`; None if there is none."""
        if not (folder / PLAN).exists():
            return None
        stored = read_json(folder / PLAN, "delete the dataset's folder, and prepare it again")
        tasks = (Task(Position(*start), Position(*end), n) for start, end, n in stored["tasks"])
        return cls(stored["key"], stored["name"], tuple(tasks), Cut.load(stored.get("cut")))

    def save(self, folder: Path) -> None:
        """Write the plan to `folder` atomically."""
        cut = {"cut": asdict(self.cut)} if self.cut else {}
        value = {"key": self.key, "name": self.name, "tasks": self.tasks, **cut}
        write_json(folder / PLAN, value)


def end_of(documents: Documents) -> Position:
    """Return the position after all rows."""
    if isinstance(documents, FileDocuments):
        return Position(len(documents.files), 0)
    return Position(_streamed(documents).rows.num_shards, 0)


def plan(
    documents: Documents, start: Position, *, text_bytes: float, task_bytes: float
) -> Iterator[Task]:
    """Cut the source into tasks.

    Args:
        text_bytes: rough size of the text to cut.
        task_bytes: smallest size of the text of a task but the last.
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
        source_file = documents.files[file]
        if kind_of(source_file.name) != ".parquet":
            return [(Position(file + 1, 0), source_file.bytes)]
        try:
            metadata = documents.read_metadata(source_file)
        except Exception as error:
            if file_fault(error) is None:
                raise
            # Its task reports it, or leaves it out.
            return [(Position(file + 1, 0), source_file.bytes)]
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
    # The hub's libraries take a second to import, and local text does not need them.
    from app.prepare.hub import StreamedDocuments

    assert isinstance(documents, StreamedDocuments)
    return documents
