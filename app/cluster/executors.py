"""Executors of the tasks: local processes, Ray, Slurm; all derived from datatrove's.

Tasks, logs and statistics are datatrove's. But its own pools, here and in its Ray actors, wait for
ever for a process that was killed, so this module distributes the tasks.
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
from app.errors import AppError, ExhaustedError, ExitCode, ExitWithCode, NetworkError, UserError
from app.failures import translate_error

_MAX_DEATHS = 5
_CANCEL_SECONDS = 30.0

# Takes the step, the number of tasks and a folder for logs; yields the tasks that are done.
Run = Callable[[WritePart, int, Path], Iterator[int]]


def do_task(executor: Any, task: int) -> AppError | None:
    """Do a task of an executor; returns the failure of text, disk or network, if there is one."""
    try:
        # The task's log has the same lines.
        with redirect_stderr(io.StringIO()):
            executor._run_for_rank(task, local_rank=1)
    except AppError as error:
        return error
    except (OSError, MemoryError, RuntimeError) as error:
        if (failure := translate_error(error)) is None:
            raise
        return failure
    return None


def _died(task: int) -> ExhaustedError:
    return ExhaustedError(
        f"the process of task {task} was killed again and again, perhaps for lack of memory",
        "lower PREPARE_WORKERS; the same command does what is missing",
    )


class LocalExecutor(ByParts, LocalPipelineExecutor):
    """Tasks in processes of this machine."""

    def run(self) -> Iterator[int]:
        """Do the tasks that are missing; yields each when it is done.

        Raises:
            AppError: a task has failed, or its process was killed too often.
            ExitWithCode: a bug, whose traceback the process has printed.
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
                        failure = connection.recv()
                    except (EOFError, OSError):
                        worker.process.join()
                        workers.remove(worker)
                        if worker.process.exitcode > 0:
                            raise ExitWithCode(ExitCode.BUG) from None
                        deaths[task] += 1
                        if deaths[task] == _MAX_DEATHS:
                            raise _died(task) from None
                        waiting.appendleft(task)
                        continue
                    if failure:
                        raise failure
                    idle.append(worker)
                    yield task
        finally:
            for worker in workers:
                worker.process.kill()
                worker.process.join()


class _Worker:
    """A process that does one task after the other, and the connection to it."""

    def __init__(self, executor: LocalExecutor) -> None:
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(executor, theirs), daemon=True)
        self.process.start()
        # Only the process itself may hold this end, so that its death closes the connection.
        theirs.close()


def _work(executor: LocalExecutor, connection: Any) -> None:
    # Ctrl-C in a terminal is meant for the process that distributes the tasks.
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

    datatrove's Ray executor would mix the logs of several datasets.
    """

    def run(self) -> Iterator[int]:
        """Do the tasks that are missing; yields each when it is done.

        Raises:
            AppError: a task has failed, or its process was killed too often.
        """
        import ray

        executor = ray.put(self)
        run = ray.remote(num_cpus=1, max_retries=_MAX_DEATHS - 1)(do_task)
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
                        failure = ray.get(reference)
                    except ray.exceptions.RayError as error:
                        # The task's own exception, a bug, is the error's cause.
                        if not isinstance(getattr(error, "cause", error), ray.exceptions.RayError):
                            raise
                        raise _died(task) from None
                    if failure:
                        raise failure
                    yield task
        finally:
            for reference in running:
                ray.cancel(reference, force=True)
            if running:
                ray.wait(list(running), num_returns=len(running), timeout=_CANCEL_SECONDS)


@contextmanager
def engine(kind: str, workers: int | None, options: dict[str, str]) -> Iterator[tuple[Run, int]]:
    """Provide the tasks' executor, and how many it runs at the same time.

    Args:
        kind: local, ray or slurm.
        workers: number of simultaneous tasks; None for one per core.
        options: sbatch options.

    Raises:
        UserError: Slurm's partition is missing.
        NetworkError: there is no Ray cluster.
    """
    if kind == "slurm" and "partition" not in options:
        raise UserError("Slurm needs a partition", "name yours: --sbatch partition=NAME")
    # Its messages are in the tasks' logs.
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
            shared: dict[str, Any] = {"tasks": tasks, "workers": count, "logging_dir": str(logs)}
            if kind == "slurm":
                return SlurmExecutor([step], options=options, **shared).run()
            return (RayExecutor if kind == "ray" else LocalExecutor)([step], **shared).run()

        yield run, max(count, 1)


@contextmanager
def _ray() -> Iterator[int]:
    """Connect to the Ray cluster of RAY_ADDRESS or this machine, or start one; yields its cores.

    Raises:
        NetworkError: it does not answer, or does not start within Ray's half a minute.
    """
    # Ray would report its usage to its makers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would restart tasks that it kills for lack of memory for ever.
    os.environ.setdefault("RAY_task_oom_retries", str(_MAX_DEATHS - 1))
    import ray

    try:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        # A node that starts too slowly raises a bare Exception.
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
