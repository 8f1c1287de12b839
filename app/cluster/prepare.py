"""Plans the tasks, has them done, and makes one dataset of what they have written."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from app.cluster.dataset import Stream
from app.cluster.executors import NotSubmittedError, Run
from app.cluster.step import WritePart, part_folder
from app.cluster.tasks import BEGIN, Task, end_of, open_here, plan
from app.data.batches import Documents, Position
from app.data.documents import TextSource
from app.data.prepare import (
    TooLittleText,
    already_complete,
    new_manifest,
    refuse_difference,
    refuse_foreign_shards,
    refuse_too_little,
    settings_of_bytes,
    stoppable,
    summary,
)
from app.data.progress import TokenProgress
from app.data.shards import MANIFEST, Manifest
from app.errors import UserError
from app.files import locked, read_json, write_json

# Of GPT-2 on English web text, 4.5; the rest is planned when it is known what it is here.
_BYTES_PER_TOKEN = 4.0
_LEAST_TASK_BYTES = 8 << 20
_TASKS_PER_WORKER = 4


def prepare(
    source: TextSource,
    out_dir: Path,
    run: Run,
    *,
    name: str,
    total_tokens: int | None,
    val_tokens: int,
    shard_size: int,
    workers: int,
    task_bytes: int | None = None,
) -> Manifest | None:
    """Write the dataset that app.data.prepare.prepare writes, but for where its shards end.

    Args:
        source: opened on every machine.
        out_dir: on a disk that all machines share.
        run: see app.cluster.executors.engine.
        name, total_tokens, val_tokens, shard_size: see app.data.prepare.prepare.
        workers: tasks at the same time.
        task_bytes: text that a task has at least; None for what suits workers and shards.

    Returns:
        None if others have the tasks, and the same command is to be given when they are done.

    Raises:
        AppError: as app.data.prepare.prepare; the same command goes on.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    asked = settings_of_bytes(source, total_tokens, val_tokens, shard_size)
    # `app prepare` would begin anew in this folder: it is refused until the dataset is complete.
    unfinished = asked | {"prepared_by": "app.cluster"}
    parts = out_dir / "parts"
    with locked(out_dir, "prepare"), stoppable(out_dir):
        previous = Manifest.load(out_dir)
        if previous is None:
            refuse_foreign_shards(out_dir)
        else:
            now = asked if previous.complete else unfinished
            refuse_difference(out_dir, previous.settings, now)
            source = replace(source, revision=previous.source.get("revision", source.revision))
        documents = open_here(source)
        source = replace(source, revision=documents.source.get("revision", source.revision))
        if previous is not None:
            refuse_difference(out_dir, previous.source, documents.source)
            if previous.complete:
                shutil.rmtree(parts, ignore_errors=True)
                return already_complete(out_dir, previous)
        new_manifest(documents, unfinished).save(out_dir)
        parts.mkdir(exist_ok=True)
        job = _Job(source, documents, parts, asked, name, workers, task_bytes)
        try:
            stream = job.encode(run)
            if stream is None:
                return None
            refuse_too_little(
                min(stream.tokens, stream.held_out),
                stream.end - stream.start,
                stream.start - stream.held_out,
                held_out=stream.held_out,
            )
        except NotSubmittedError:
            raise
        except UserError as error:
            if isinstance(error, TooLittleText) or not any(parts.glob(f"*/{MANIFEST}")):
                # The fix makes it another dataset, which would be refused.
                shutil.rmtree(parts)
                (out_dir / MANIFEST).unlink()
            raise
        manifest = stream.write(out_dir, job.name, new_manifest(documents, asked))
        # One who was given up, and is not dead, may still write there.
        shutil.rmtree(parts, ignore_errors=True)
        print(summary(out_dir, manifest), flush=True)
        return manifest


class _Job:
    """The tasks of a dataset; those that were planned once stay as they are."""

    def __init__(
        self,
        source: TextSource,
        documents: Documents,
        parts: Path,
        wanted: dict[str, Any],
        name: str,
        workers: int,
        task_bytes: int | None,
    ) -> None:
        self._source, self._documents, self._parts = source, documents, parts
        self._wanted, self._workers, self._task_bytes = wanted, workers, task_bytes
        self.name, self.tasks = name, list[Task]()
        self._plan = parts / "plan.json"
        if self._plan.exists():
            planned = read_json(self._plan, "delete the dataset's folder, and prepare it again")
            # A folder of local files may have another name by now.
            self.name = planned["name"]
            self.tasks = [
                Task(Position(*start), Position(*end), text_bytes)
                for start, end, text_bytes in planned["tasks"]
            ]

    def encode(self, run: Run) -> Stream | None:
        """Have all tasks done that it takes; None if they are not yet."""
        while True:
            self._do_tasks(run)
            folders = [part_folder(self._parts, task) for task in range(len(self.tasks))]
            missing = sum(not folder.exists() for folder in folders)
            if missing:
                print(
                    f"{missing} of {len(folders)} tasks are under way: give the same command when "
                    "they have ended",
                    flush=True,
                )
                return None
            stream = Stream(folders, self._wanted)
            planned_to = self.tasks[-1].end if self.tasks else BEGIN
            if stream.full or planned_to == end_of(self._documents):
                return stream
            self._plan_more(planned_to, stream)

    def _do_tasks(self, run: Run) -> None:
        step = WritePart(
            self._source,
            self._documents.source,
            self.tasks,
            self._parts,
            self.name,
            self._wanted["shard_size"],
        )
        with TokenProgress(None) as progress:
            tokens = done = 0
            for task in run([step], len(self.tasks), self._parts / "datatrove"):
                manifest = Manifest.load(part_folder(self._parts, task))
                tokens, done = tokens + (manifest.tokens("train") if manifest else 0), done + 1
                progress.show(tokens, done / len(self.tasks))

    def _plan_more(self, start: Position, stream: Stream) -> None:
        text_bytes = float("inf")
        if self._wanted["total_tokens"] != "all":
            planned = sum(task.text_bytes for task in self.tasks)
            rate = planned / stream.tokens if stream.tokens else _BYTES_PER_TOKEN
            missing = self._wanted["total_tokens"] - (stream.end - stream.start)
            missing += max(0, stream.held_out - stream.tokens)
            text_bytes = missing * rate
        self.tasks += plan(
            self._documents,
            start,
            text_bytes=text_bytes,
            task_bytes=self._task_bytes or self._usual_task_bytes(text_bytes),
        )
        tasks = [(task.start, task.end, task.text_bytes) for task in self.tasks]
        write_json(self._plan, {"name": self.name, "tasks": tasks})

    def _usual_task_bytes(self, text_bytes: float) -> float:
        """So much that a task fills a shard, or less where not all workers would have several."""
        files = getattr(self._documents, "files", ())
        text_bytes = min(text_bytes, sum(file.bytes for file in files) or text_bytes)
        each = text_bytes / (_TASKS_PER_WORKER * self._workers)
        return min(max(each, _LEAST_TASK_BYTES), self._wanted["shard_size"] * _BYTES_PER_TOKEN)
