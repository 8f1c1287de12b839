"""The step of datatrove's pipeline: a task's text becomes a part, a small dataset of its own."""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

from datatrove.pipeline.base import PipelineStep

from app.cluster.tasks import Task, open_here
from app.data.ahead import ahead
from app.data.batches import Batch, Documents, batches
from app.data.documents import TextSource
from app.data.encoder import DocumentEncoder
from app.data.prepare import new_manifest, refuse_difference
from app.data.shard_writer import EncodedBatch, ShardWriter
from app.data.shards import Manifest
from app.files import PARTIAL, fsync_folder

# A process does many tasks.
_encoder = cache(DocumentEncoder)
_open = cache(open_here)


def part_folder(parts: Path, task: int) -> Path:
    """Where a task's shards are, once all of them are."""
    return parts / f"{task:05d}"


class WritePart(PipelineStep):
    """Encodes the task of its rank, and writes its shards and their manifest.

    A part has its name when it is complete. Whoever writes it a second time, since a task was given
    to two machines, changes nothing.

    Args:
        source: opened on the machine that works.
        listing: what the source was when the tasks were planned.
        tasks: of all ranks.
        parts: folder of all parts, on a disk that all machines share.
        name: what the shards' names begin with.
        shard_size: tokens of each shard but a part's last.
    """

    type = "gpt-compose"
    name = "text to token shards"

    def __init__(
        self,
        source: TextSource,
        listing: Mapping[str, Any],
        tasks: Sequence[Task],
        parts: Path,
        name: str,
        shard_size: int,
    ) -> None:
        super().__init__()
        self.source, self.listing, self.tasks = source, listing, tasks
        self.parts, self.dataset_name, self.shard_size = parts, name, shard_size

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Sequence[Any]:
        """Write the part of a rank; gives no documents on.

        Raises:
            UserError: the text cannot be read, or is not what was planned.
            NetworkError: the hub does not answer.
        """
        part = part_folder(self.parts, rank)
        for left in self.parts.glob(f"{part.name}.*{PARTIAL}"):
            shutil.rmtree(left, ignore_errors=True)
        if part.exists():
            return ()
        documents = _open(self.source)
        refuse_difference(self.parts.parent, self.listing, documents.source)
        attempt = part.with_name(f"{part.name}.{uuid4().hex}{PARTIAL}")
        attempt.mkdir()
        try:
            manifest = self._write(documents, self.tasks[rank], attempt)
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

    def _write(self, documents: Documents, task: Task, folder: Path) -> Manifest:
        encoder = _encoder()

        def encode(batch: Batch) -> EncodedBatch:
            return EncodedBatch(batch, *encoder.encode(batch.texts()))

        everything = {"total_tokens": "all", "val_tokens": 0, "shard_size": self.shard_size}
        with (
            ShardWriter(folder, self.dataset_name, new_manifest(documents, everything)) as writer,
            closing(task.pieces(documents)) as pieces,
            closing(ahead(encode, batches(pieces), threads=1, waiting=2)) as encoded,
        ):
            for batch in encoded:
                writer.write(batch)
            return writer.finish()
