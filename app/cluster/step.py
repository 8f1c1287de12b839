"""The step of datatrove's pipeline: a task's text becomes a part, a small dataset of its own."""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

from datatrove.pipeline.base import PipelineStep

from app.cluster.tasks import Plan
from app.errors import UserError
from app.files import PARTIAL, fsync_folder
from app.prepare.encoder import DocumentEncoder
from app.prepare.pipeline import check_matches, new_manifest, write_documents
from app.prepare.shard_writer import ShardWriter
from app.prepare.sources import open_documents
from app.prepare.spec import DatasetSpec

# A process does many tasks.
_encoder = cache(DocumentEncoder)
_open = cache(open_documents)


@cache
def _plan(parts: Path, num_tasks: int) -> Plan:
    """Return the plan that `parts` belongs to; UserError if it is not the one of `num_tasks`."""
    plan = Plan.load(parts.parent)
    if plan is None or plan.key != parts.name or len(plan.tasks) < num_tasks:
        raise UserError("the tasks were planned anew", "run the same command again")
    return plan


class WritePart(PipelineStep):
    """Encodes the task of its rank, and writes its shards and their manifest.

    A part gets its name when it is complete. If a task runs twice, because two machines were
    given it, the second part is discarded.

    Args:
        spec: the spec of each part: all its tokens, none held out.
        listing: the source as it was when the tasks were planned.
        parts: folder of the plan's parts, on a disk that all machines share.
    """

    type = "gpt-compose"
    name = "text to token shards"

    def __init__(self, spec: DatasetSpec, listing: Mapping[str, Any], parts: Path) -> None:
        super().__init__()
        self.spec, self.listing, self.parts = spec, listing, parts

    def part(self, task: int) -> Path:
        """Return the folder of a task's shards, which exists when all of them are there."""
        return self.parts / f"{task:05d}"

    def done(self, num_tasks: int) -> set[int]:
        """Return the tasks whose parts are complete."""
        names = {path.name for path in self.parts.iterdir()}
        return {task for task in range(num_tasks) if self.part(task).name in names}

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Sequence[Any]:
        """Write the part of a rank; passes no documents on.

        Raises:
            UserError: the text cannot be read, or is not what was planned.
            NetworkError: the hub does not answer.
        """
        part = self.part(rank)
        if part.exists():
            return ()
        plan = _plan(self.parts, world_size)
        spec = replace(self.spec, name=plan.name)
        # The token is not part of the source, which Slurm's jobs store.
        documents = _open(spec.source, os.environ.get("HF_TOKEN"))
        check_matches(self.parts.parents[1], self.listing, documents.source)
        attempt = part.with_name(f"{part.name}.{uuid4().hex}{PARTIAL}")
        attempt.mkdir()
        try:
            with ShardWriter(attempt, spec, new_manifest(documents, spec.settings)) as writer:
                chunks = plan.tasks[rank].chunks(documents)
                write_documents(chunks, _encoder(), writer, workers=1, cut=plan.cut)
                manifest = writer.finish()
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


class ByParts:
    """Makes an executor consider a task done when its part is there.

    datatrove's own marks could contradict that.
    """

    pipeline: list[WritePart]
    world_size: int

    def is_rank_completed(self, rank: int) -> bool:
        """Return True if a task is done."""
        return self.pipeline[0].part(rank).exists()

    def get_incomplete_ranks(self) -> list[int]:
        """Return the tasks that are not done."""
        return sorted({*range(self.world_size)} - self.pipeline[0].done(self.world_size))

    def mark_rank_as_completed(self, rank: int) -> None:
        """Do nothing: the part has got its name."""
