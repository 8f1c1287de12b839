"""Plans the tasks, runs them, and makes one dataset of their parts."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

from app.cluster.dataset import Stream
from app.cluster.executors import Run
from app.cluster.slurm import NotSubmittedError
from app.cluster.step import WritePart
from app.cluster.tasks import Plan, end_of, plan
from app.data.manifest import MANIFEST, Manifest
from app.errors import UserError
from app.prepare.documents import Documents
from app.prepare.encoder import DocumentEncoder
from app.prepare.enough_text import TooLittleText, check_enough_text
from app.prepare.held_out import find_cut
from app.prepare.pipeline import new_manifest, preparing, resume, summary, with_cut
from app.prepare.shard_writer import check_bad
from app.prepare.spec import DatasetSpec
from app.progress import TokenProgress

# English web text has 4.5; when the text's own number is known, the rest is planned with it.
_BYTES_PER_TOKEN = 4.0
_MIN_TASK_BYTES = 8 << 20
_TASKS_PER_WORKER = 4


def prepare(
    spec: DatasetSpec, folder: Path, run: Run, *, workers: int, task_bytes: int | None = None
) -> Manifest | None:
    """Write the dataset that app.prepare.pipeline.prepare writes, with other ends of shards.

    Args:
        folder: the dataset's folder, on a disk that all machines share.
        run: see app.cluster.executors.engine.
        workers: number of simultaneous tasks.
        task_bytes: smallest size of a task's text; None for what suits workers and shards.

    Returns:
        None if tasks are still running elsewhere: run it again when they have ended.

    Raises:
        AppError: as app.prepare.pipeline.prepare; the same command continues.
    """
    parts, settings = folder / "parts", spec.settings
    with preparing(folder):
        # `app prepare` would start over: the added setting makes it refuse an incomplete folder.
        manifest, documents = resume(
            spec, folder, os.environ.get("HF_TOKEN"), {"prepared_by": "app.cluster"}
        )
        if documents is None or not (folder / MANIFEST).exists():
            shutil.rmtree(parts, ignore_errors=True)
        if documents is None:
            return manifest
        revision = documents.source.get("revision", spec.source.revision)
        spec = replace(spec, source=replace(spec.source, revision=revision))
        manifest.save(folder)
        parts.mkdir(exist_ok=True)
        job = _Job(spec, documents, parts, workers, task_bytes)
        spec = job.spec
        try:
            stream = job.encode(run)
            if stream is None:
                return None
            held_out = min(stream.tokens, spec.held_out_tokens)
            train = max(0, stream.end - stream.start)
            check_bad(spec, stream.bad, stream.rows, stream.left_out)
            check_enough_text(spec, held_out, train, stream.between, stream.bad)
        except NotSubmittedError:
            raise
        except UserError as error:
            if isinstance(error, TooLittleText) or not any(parts.glob(f"*/*/{MANIFEST}")):
                # The remedy changes the dataset, and this folder would refuse to hold another one.
                (folder / MANIFEST).unlink()
                shutil.rmtree(parts, ignore_errors=True)
            raise
        complete = stream.write(folder, job.plan.name, new_manifest(documents, settings))
        # A worker that was given up, but is alive, may still write there.
        shutil.rmtree(parts, ignore_errors=True)
        if job.plan.cut:
            print(job.plan.cut.message, flush=True)
        print(summary(folder, complete), flush=True)
        return complete


class _Job:
    """The tasks of a dataset. A task that is planned does not change any more."""

    def __init__(
        self,
        spec: DatasetSpec,
        documents: Documents,
        folder: Path,
        workers: int,
        task_bytes: int | None,
    ) -> None:
        self._documents, self._folder = documents, folder
        self._workers, self._task_bytes = workers, task_bytes
        # A folder of local files may have been renamed since it was planned.
        self.plan = Plan.load(folder) or Plan(
            uuid4().hex, spec.name, cut=find_cut(spec, documents, DocumentEncoder())
        )
        self.spec = with_cut(spec, self.plan.cut)

    def encode(self, run: Run) -> Stream | None:
        """Run tasks until they have produced enough tokens; None if some are still unfinished."""
        parts = self._folder / self.plan.key
        parts.mkdir(exist_ok=True)
        everything = replace(self.spec, total_tokens=None, val_tokens=0)
        step = WritePart(everything, self._documents.source, parts)
        logs = self._folder / "datatrove"
        while True:
            tasks = self.plan.tasks
            with self._progress(step) as progress:
                for task in run(step, len(tasks), logs):
                    progress(task)
            missing = len(tasks) - len(step.done(len(tasks)))
            if missing:
                print(
                    f"{missing} of {len(tasks)} tasks are running or have failed (see {logs}): run "
                    "the same command again when they have ended",
                    flush=True,
                )
                return None
            stream = Stream([step.part(task) for task in range(len(tasks))], self.spec)
            if stream.full or self.plan.end == end_of(self._documents):
                return stream
            self._plan_more(stream)

    @contextmanager
    def _progress(self, step: WritePart) -> Iterator[Callable[[int], None]]:
        """Provide a function that shows the progress when a task is done."""
        tasks = len(self.plan.tasks)
        tokens = {task: _tokens(step.part(task)) for task in step.done(tasks)}
        with TokenProgress(None, done=sum(tokens.values())) as progress:

            def show(task: int) -> None:
                tokens[task] = _tokens(step.part(task))
                progress.show(sum(tokens.values()), len(tokens) / tasks)

            yield show

    def _plan_more(self, stream: Stream) -> None:
        # Reading the footers of many files on the hub takes minutes.
        print("planning the tasks", flush=True)
        text_bytes = float("inf")
        if self.spec.total_tokens:
            planned = sum(task.text_bytes for task in self.plan.tasks)
            bytes_per_token = planned / stream.tokens if stream.tokens else _BYTES_PER_TOKEN
            missing = self.spec.total_tokens - (stream.end - stream.start)
            text_bytes = missing * bytes_per_token
        tasks = plan(
            self._documents,
            self.plan.end,
            text_bytes=text_bytes,
            task_bytes=self._task_bytes or self._usual_task_bytes(text_bytes),
        )
        self.plan = replace(self.plan, tasks=(*self.plan.tasks, *tasks))
        self.plan.save(self._folder)

    def _usual_task_bytes(self, text_bytes: float) -> float:
        """Return a shard's text, or less to give each worker several tasks."""
        files = getattr(self._documents, "files", ())
        text_bytes = min(text_bytes, sum(file.bytes for file in files) or text_bytes)
        each = text_bytes / (_TASKS_PER_WORKER * self._workers)
        return min(max(each, _MIN_TASK_BYTES), self.spec.shard_size * _BYTES_PER_TOKEN)


def _tokens(part: Path) -> int:
    manifest = Manifest.load(part)
    return manifest.tokens("train") if manifest else 0
