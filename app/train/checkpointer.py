"""Checkpoints saved in the background: training waits only for the copy in memory."""

import dataclasses
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

from torch import nn

from app.data.dataset import ShardVerification
from app.distributed.world import World
from app.failures import translate_error
from app.runs.checkpoint import Snapshot, checkpoint_folder, write_checkpoint
from app.runs.checkpoint_state import CheckpointState
from app.runs.checkpoints import prune_checkpoints
from app.runs.folder import RunFolder
from app.runs.run_logger import RunLogger
from app.train.optimizer import Optimizers


class Checkpointer:
    """Saves checkpoints in a thread, one at a time, and prunes old ones. Only rank 0 writes.

    Nothing is saved before the hashes of the dataset's shards are known to be right. A save that
    fails because of the disk is reported, and training continues: there may be room again for the
    next one. Use it as a context manager: leaving it waits for a running save.

    Args:
        keep: number of latest checkpoints to keep, besides the one with the lowest held-out loss.
        log: rank 0's logger, flushed to the disk before each save; None on the other ranks.
        verification: rank 0's verification of the shards; None on the other ranks.
    """

    def __init__(
        self,
        run: RunFolder,
        keep: int,
        world: World,
        log: RunLogger | None,
        verification: ShardVerification | None,
        print_line: Callable[[str], None],
    ) -> None:
        self._run, self._keep, self._world = run, keep, world
        self._log, self._verification, self._print_line = log, verification, print_line
        self._snapshot = Snapshot()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[str] | None = None
        self._failure: OSError | None = None

    def save(
        self,
        state: CheckpointState,
        model: nn.Module,
        optimizers: Optimizers,
        *,
        replace: bool = False,
        max_verification_seconds: float | None = None,
    ) -> None:
        """Wait for the previous save, snapshot everything, and write it in the thread. Collective.

        Args:
            state: the checkpoint's state, without the lengths of metrics and samples.
            replace: replace a checkpoint of the same step; otherwise that one stays.
            max_verification_seconds: limit on the wait for the shards' hashes, after which nothing
                is saved.

        Raises:
            UserError: a shard is damaged.
        """
        durable = None
        if self._log and self._wait_for_verification(max_verification_seconds):
            durable = self._begin(state, self._log, replace=replace)
        if not self._world.broadcast(durable is not None):
            return
        if durable is None:
            optimizers.join_gather(model)
            return
        self._snapshot.take(model, optimizers)
        self._running = self._thread.submit(self._write, durable)

    @property
    def may_save(self) -> bool:
        """Return False while the shards are being verified."""
        return self._verification is None or self._verification.done()

    def _wait_for_verification(self, seconds: float | None) -> bool:
        if self._verification is None:
            return True
        if not self._verification.wait(seconds):
            self._print_line("warning: not saved: the shards are still being verified")
            return False
        self._verification.result()
        return True

    def _begin(
        self, state: CheckpointState, log: RunLogger, *, replace: bool
    ) -> CheckpointState | None:
        """Return the state with the synced file lengths, or None if there is nothing to save."""
        self._report()
        if checkpoint_folder(self._run.checkpoints, state.step).exists() and not replace:
            return None
        try:
            metrics_lines, samples_bytes = log.sync()
        except OSError as error:
            self._report_failure(error)
            return None
        return dataclasses.replace(state, metrics_lines=metrics_lines, samples_bytes=samples_bytes)

    def _write(self, state: CheckpointState) -> str:
        folder = checkpoint_folder(self._run.checkpoints, state.step)
        write_checkpoint(folder, self._snapshot, state)
        message = f"after {state.step} steps: saved {folder}"
        try:
            prune_checkpoints(self._run.checkpoints, self._keep)
        except OSError as error:
            return f"{message}; warning: older ones could not be deleted: {error}"
        return message

    def poll(self) -> None:
        """Report how the running save has ended, if it has.

        Raises:
            UserError: a shard has turned out to be damaged.
        """
        if self._running and self._running.done():
            self._report()
        if self._verification and self._verification.done():
            self._verification.result()

    def wait(self) -> None:
        """Wait for the running save.

        Raises:
            OSError: the last save has failed.
        """
        self._report()
        if self._failure:
            raise self._failure

    def _report(self) -> None:
        if self._running is None:
            return
        save, self._running = self._running, None
        try:
            message = save.result()
        except OSError as error:
            self._report_failure(error)
        else:
            self._failure = None
            self._print_line(message)

    def _report_failure(self, error: OSError) -> None:
        self._failure = error
        known = translate_error(error)
        self._print_line(
            f"warning: checkpoint not saved: {known.problem if known else error}; "
            "training continues, and tries again at the next checkpoint"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._thread.shutdown()
