"""The step of datatrove's pipeline: a task's text becomes a part, a small dataset of its own."""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

from datatrove.pipeline.base import PipelineStep

from app.cluster.tasks import Plan, Task, open_here
from app.data.manifest import Manifest
from app.errors import UserError
from app.files import PARTIAL, fsync_folder
from app.prefetch import prefetch
from app.prepare.documents import Batch, Documents, batches
from app.prepare.encoder import DocumentEncoder
from app.prepare.pipeline import check_matches, new_manifest
from app.prepare.shard_writer import EncodedBatch, ShardWriter
from app.prepare.sources import TextSource

# A process does many tasks.
_encoder = cache(DocumentEncoder)
_open = cache(open_here)


@cache
def _plan(parts: Path, num_tasks: int) -> Plan:
    """The plan that `parts` belongs to, when it had so many tasks."""
    plan = Plan.load(parts.parent)
    if plan is None or plan.key != parts.name or len(plan.tasks) < num_tasks:
        raise UserError("the tasks were planned anew", "give the same command again")
    return plan


class WritePart(PipelineStep):
    """Encodes the task of its rank, and writes its shards and their manifest.

    A part has its name when it is complete. Whoever writes it a second time, since a task was given
    to two machines, changes nothing.

    Args:
        source: opened on the machine that works.
        listing: what the source was when the tasks were planned.
        parts: folder of the plan's parts, on a disk that all machines share.
        shard_size: tokens of each shard but a part's last.
    """

    type = "gpt-compose"
    name = "text to token shards"

    def __init__(
        self, source: TextSource, listing: Mapping[str, Any], parts: Path, shard_size: int
    ) -> None:
        super().__init__()
        self.source, self.listing = source, listing
        self.parts, self.shard_size = parts, shard_size

    def part(self, task: int) -> Path:
        """Return where a task's shards are, once all of them are there."""
        return self.parts / f"{task:05d}"

    def done(self, num_tasks: int) -> set[int]:
        """The tasks whose parts are there."""
        names = {path.name for path in self.parts.iterdir()}
        return {task for task in range(num_tasks) if self.part(task).name in names}

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Sequence[Any]:
        """Write the part of a rank; gives no documents on.

        Raises:
            UserError: the text cannot be read, or is not what was planned.
            NetworkError: the hub does not answer.
        """
        part = self.part(rank)
        if part.exists():
            return ()
        plan = _plan(self.parts, world_size)
        documents = _open(self.source)
        check_matches(self.parts.parents[1], self.listing, documents.source)
        attempt = part.with_name(f"{part.name}.{uuid4().hex}{PARTIAL}")
        attempt.mkdir()
        try:
            manifest = self._write(documents, plan.tasks[rank], plan.name, attempt)
            fsync_folder(attempt)
            try:
                attempt.rename(part)
            except OSError:
                if not part.exists():
                    raise
            fsync_folder(self.parts)
        finally:
            shutil.rmtree(attempt, ignore_errors=True)
        self.stat_update("documents", value=manifest.counts["documents"])
        self.stat_update("tokens", value=manifest.tokens("train"))
        return ()

    def _write(self, documents: Documents, task: Task, name: str, folder: Path) -> Manifest:
        encoder = _encoder()

        def encode(batch: Batch) -> EncodedBatch:
            return EncodedBatch(batch, *encoder.encode(batch.texts()))

        everything = {"total_tokens": "all", "val_tokens": 0, "shard_size": self.shard_size}
        with (
            ShardWriter(folder, name, new_manifest(documents, everything)) as writer,
            closing(task.pieces(documents)) as pieces,
            closing(prefetch(encode, batches(pieces), threads=1, max_pending=2)) as encoded,
        ):
            for batch in encoded:
                writer.write(batch)
            return writer.finish()


class ByParts:
    """An executor's view of the tasks: one is done when its part is there.

    datatrove's own mark would be a second truth.
    """

    pipeline: list[WritePart]
    world_size: int

    def is_rank_completed(self, rank: int) -> bool:
        """Return True if a task is done."""
        return self.pipeline[0].part(rank).exists()

    def get_incomplete_ranks(self) -> list[int]:
        """The tasks that are to be done."""
        return sorted({*range(self.world_size)} - self.pipeline[0].done(self.world_size))

    def mark_rank_as_completed(self, rank: int) -> None:
        """The part has been renamed."""
