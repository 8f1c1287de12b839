"""Plans the tasks, has them done, and makes one dataset of what they have written."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from app.cluster.dataset import Stream
from app.cluster.executors import Run
from app.cluster.slurm import NotSubmittedError
from app.cluster.step import WritePart
from app.cluster.tasks import Plan, end_of, open_here, plan
from app.data.manifest import MANIFEST, Manifest
from app.errors import UserError
from app.files import locked
from app.prepare.documents import Documents
from app.prepare.pipeline import (
    TooLittleText,
    already_complete,
    check_matches,
    new_manifest,
    refuse_foreign_shards,
    refuse_too_little,
    settings_of_bytes,
    stoppable,
    summary,
)
from app.prepare.sources import TextSource
from app.progress import TokenProgress

# On English web text GPT-2's have 4.5; the rest is planned when the text's own is known.
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
            shutil.rmtree(parts, ignore_errors=True)
        else:
            now = asked if previous.complete else unfinished
            check_matches(out_dir, previous.settings, now)
            source = replace(source, revision=previous.source.get("revision", source.revision))
        documents = open_here(source)
        source = replace(source, revision=documents.source.get("revision", source.revision))
        if previous is not None:
            check_matches(out_dir, previous.source, documents.source)
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
            if isinstance(error, TooLittleText) or not any(parts.glob(f"*/*/{MANIFEST}")):
                # The fix makes it another dataset, which would be refused.
                (out_dir / MANIFEST).unlink()
                shutil.rmtree(parts, ignore_errors=True)
            raise
        manifest = stream.write(out_dir, job.plan.name, new_manifest(documents, asked))
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
        folder: Path,
        wanted: dict[str, Any],
        name: str,
        workers: int,
        task_bytes: int | None,
    ) -> None:
        self._source, self._documents, self._folder = source, documents, folder
        self._wanted, self._workers, self._task_bytes = wanted, workers, task_bytes
        # A folder of local files may have another name than when it was planned.
        self.plan = Plan.load(folder) or Plan(uuid4().hex, name)

    def encode(self, run: Run) -> Stream | None:
        """Have all tasks done that it takes; None if they are not yet."""
        parts = self._folder / self.plan.key
        parts.mkdir(exist_ok=True)
        step = WritePart(self._source, self._documents.source, parts, self._wanted["shard_size"])
        logs = self._folder / "datatrove"
        while True:
            tasks = self.plan.tasks
            with self._progress(step) as progress:
                for task in run(step, len(tasks), logs):
                    progress(task)
            missing = len(tasks) - len(step.done(len(tasks)))
            if missing:
                print(
                    f"{missing} of {len(tasks)} tasks are under way, or have failed ({logs} says "
                    "why): give the same command when they have ended",
                    flush=True,
                )
                return None
            stream = Stream([step.part(task) for task in range(len(tasks))], self._wanted)
            if stream.full or self.plan.end == end_of(self._documents):
                return stream
            self._plan_more(stream)

    @contextmanager
    def _progress(self, step: WritePart) -> Iterator[Callable[[int], None]]:
        """Show how far the tasks are, with each one that is done."""
        of_task = {
            task: _tokens(step.part(task)) for task in sorted(step.done(len(self.plan.tasks)))
        }
        with TokenProgress(None, done=sum(of_task.values())) as progress:

            def show(task: int) -> None:
                of_task[task] = _tokens(step.part(task))
                progress.show(sum(of_task.values()), len(of_task) / len(self.plan.tasks))

            yield show

    def _plan_more(self, stream: Stream) -> None:
        # Reading the footers of many files on a hub takes minutes.
        print("planning the tasks", flush=True)
        text_bytes = float("inf")
        if self._wanted["total_tokens"] != "all":
            planned = sum(task.text_bytes for task in self.plan.tasks)
            rate = planned / stream.tokens if stream.tokens else _BYTES_PER_TOKEN
            missing = self._wanted["total_tokens"] - (stream.end - stream.start)
            text_bytes = missing * rate
        tasks = plan(
            self._documents,
            self.plan.end,
            text_bytes=text_bytes,
            task_bytes=self._task_bytes or self._usual_task_bytes(text_bytes),
        )
        self.plan = replace(self.plan, tasks=(*self.plan.tasks, *tasks))
        self.plan.save(self._folder)

    def _usual_task_bytes(self, text_bytes: float) -> float:
        """So much that a task fills a shard, or less where not all workers would have several."""
        files = getattr(self._documents, "files", ())
        text_bytes = min(text_bytes, sum(file.bytes for file in files) or text_bytes)
        each = text_bytes / (_TASKS_PER_WORKER * self._workers)
        return min(max(each, _LEAST_TASK_BYTES), self._wanted["shard_size"] * _BYTES_PER_TOKEN)


def _tokens(part: Path) -> int:
    manifest = Manifest.load(part)
    return manifest.tokens("train") if manifest else 0
