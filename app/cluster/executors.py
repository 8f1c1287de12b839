"""Executors of the tasks: local processes, Ray, Slurm; all on datatrove's.

Of these come tasks, logs and statistics. But whoever starts datatrove's own pools waits for ever
for a process that was killed, here and in each of its Ray actors: the tasks are given out here.
"""

import io
import logging
import os
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor
from datatrove.utils.logging import logger
from multiprocess import get_context
from multiprocess.connection import wait

from app.cluster.slurm import SlurmExecutor
from app.cluster.step import ByParts, WritePart
from app.errors import (
    AppError,
    ExhaustedError,
    ExitCode,
    ExitWithCode,
    NetworkError,
    UserError,
)
from app.failures import translate_error

_MOST_DEATHS = 5
_CANCEL_SECONDS = 30.0

# Takes what does a task, their number and a folder for logs; yields the tasks that are done.
Run = Callable[[WritePart, int, Path], Iterator[int]]
# The class, problem and fix: an AppError itself does not travel between processes.
Failure = tuple[type[AppError], str, str]


def do_task(executor: Any, task: int) -> Failure | None:
    """Do a task of an executor; returns what is wrong with text, disk or network, if anything."""
    try:
        # The task's log has it as well.
        with redirect_stderr(io.StringIO()):
            executor._run_for_rank(task, local_rank=1)
    except AppError as error:
        return type(error), error.problem, error.fix
    except (OSError, MemoryError, RuntimeError) as error:
        expected = translate_error(error)
        if expected is None:
            raise
        return type(expected), expected.problem, expected.fix
    return None


def _raise(failure: Failure | None) -> None:
    if failure is not None:
        kind, problem, fix = failure
        raise kind(problem, fix)


def _died(task: int) -> ExhaustedError:
    return ExhaustedError(
        f"whoever did task {task} was killed, again and again, perhaps for want of memory",
        "lower PREPARE_WORKERS; the same command does what is missing",
    )


class LocalExecutor(ByParts, LocalPipelineExecutor):
    """Tasks in processes of this machine."""

    def run(self) -> Iterator[int]:
        """Do what is missing; yields each task when it is done.

        Raises:
            AppError: of a task, or one that has killed its process too often.
            ExitWithCode: a bug, whose trace its process has shown.
        """
        waiting = deque(self.get_incomplete_ranks())
        deaths = Counter[int]()
        workers: list[_Worker] = []
        idle: list[_Worker] = []
        busy: dict[Any, tuple[_Worker, int]] = {}
        try:
            while waiting or busy:
                while waiting and len(busy) < self.workers:
                    if not idle:
                        idle.append(_Worker(self))
                        workers += idle
                    worker, task = idle.pop(), waiting.popleft()
                    busy[worker.connection] = worker, task
                    with suppress(ConnectionError):
                        worker.connection.send(task)
                for connection in wait(list(busy)):
                    worker, task = busy.pop(connection)
                    try:
                        _raise(connection.recv())
                    except (EOFError, OSError):
                        worker.process.join()
                        workers.remove(worker)
                        if worker.process.exitcode > 0:
                            raise ExitWithCode(ExitCode.BUG) from None
                        deaths[task] += 1
                        if deaths[task] == _MOST_DEATHS:
                            raise _died(task) from None
                        waiting.appendleft(task)
                    else:
                        idle.append(worker)
                        yield task
        finally:
            for worker in workers:
                worker.process.kill()
                worker.process.join()


class _Worker:
    """A process that does one task after the other."""

    def __init__(self, executor: LocalExecutor) -> None:
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(executor, theirs), daemon=True)
        self.process.start()
        # Only the process itself holds it, so that its death is heard of.
        theirs.close()


def _work(executor: LocalExecutor, connection: Any) -> None:
    # Ctrl-C in a terminal is meant for who gives the tasks out.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            task = connection.recv()
        except (EOFError, ConnectionError):
            return
        failure = do_task(executor, task)
        with suppress(ConnectionError):
            connection.send(failure)


class RayExecutor(ByParts, LocalPipelineExecutor):
    """Tasks on a Ray cluster, or on one that is started on this machine.

    datatrove's own for Ray writes logs where other datasets have theirs.
    """

    def run(self) -> Iterator[int]:
        """Do what is missing; yields each task when it is done.

        Raises:
            AppError: of a task, or one that has killed its process too often.
        """
        import ray

        executor = ray.put(self)
        run = ray.remote(num_cpus=1, max_retries=_MOST_DEATHS - 1)(do_task)
        waiting = deque(self.get_incomplete_ranks())
        running: dict[Any, int] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self.workers:
                    task = waiting.popleft()
                    running[run.remote(executor, task)] = task
                for reference in ray.wait(list(running))[0]:
                    task = running.pop(reference)
                    try:
                        _raise(ray.get(reference))
                    except ray.exceptions.RayError as error:
                        # A task's own exception, which only a bug leaves, is the cause of one.
                        if not isinstance(getattr(error, "cause", error), ray.exceptions.RayError):
                            raise
                        raise _died(task) from None
                    yield task
        finally:
            for reference in running:
                ray.cancel(reference, force=True)
            if running:
                ray.wait(list(running), num_returns=len(running), timeout=_CANCEL_SECONDS)


@contextmanager
def engine(kind: str, workers: int | None, options: dict[str, str]) -> Iterator[tuple[Run, int]]:
    """Provide the executor of the tasks, and the number that it does at the same time.

    Args:
        kind: local, ray or slurm.
        workers: None for as many as there are cores.
        options: of sbatch.

    Raises:
        UserError: there is no such cluster, or Slurm has got no partition.
    """
    if kind == "slurm" and "partition" not in options:
        raise UserError("Slurm needs a partition", "name yours: --sbatch partition=NAME")
    # Its words on a task are in the task's log.
    logger.disable("datatrove")
    with ExitStack() as ending:
        if kind == "slurm":
            count = workers or -1
        elif kind == "ray":
            cores = ending.enter_context(_ray())
            count = workers or cores
        else:
            count = workers or os.cpu_count() or 1

        def run(step: WritePart, tasks: int, logs: Path) -> Iterator[int]:
            of_all: dict[str, Any] = {"tasks": tasks, "workers": count, "logging_dir": str(logs)}
            if kind == "slurm":
                return SlurmExecutor([step], options=options, **of_all).run()
            return (RayExecutor if kind == "ray" else LocalExecutor)([step], **of_all).run()

        yield run, max(count, 1)


@contextmanager
def _ray() -> Iterator[int]:
    """A Ray cluster: the one that RAY_ADDRESS or this machine has, or else a new one; its cores.

    Raises:
        NetworkError: it does not answer, or does not start within Ray's half a minute.
    """
    # It would tell its makers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Tasks that Ray kills for want of memory, it would begin again for ever.
    os.environ.setdefault("RAY_task_oom_retries", str(_MOST_DEATHS - 1))
    import ray

    try:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        # A node that starts too slowly is told by the bare class.
        if type(error) is not Exception and not isinstance(error, ConnectionError):
            raise
        ray.shutdown()
        raise NetworkError(
            f"there is no Ray cluster: {error}", "correct RAY_ADDRESS, or try again later"
        ) from error
    try:
        yield int(ray.cluster_resources().get("CPU", 1))
    finally:
        ray.shutdown()
