"""Checkpoints saved beside the training: a step waits for the copies only."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from torch import nn

from app.failures import translate_error
from app.runs.checkpoint import Snapshot, checkpoint_folder, write_checkpoint
from app.runs.checkpoints import prune_checkpoints
from app.train.optimizer import Optimizers


class Saver:
    """Writes checkpoints in a thread, one at a time, and prunes old ones.

    A save that fails because of the disk is said, and the run goes on: there is room again,
    perhaps, when the next one is due. Use as a context manager: leaving it waits for the save that
    is under way.

    Args:
        checkpoints: the run's folder of them.
        keep: how many of the latest stay; the one of the lowest held-out loss stays as well.
        fsync: called before each save for what the checkpoint counts on; its result
            becomes part of the checkpoint's state.
        say: prints a line.
    """

    def __init__(
        self,
        checkpoints: Path,
        keep: int,
        fsync: Callable[[], dict[str, Any]],
        say: Callable[[str], None],
    ) -> None:
        self._checkpoints, self._keep = checkpoints, keep
        self._make_durable, self._say = fsync, say
        self._snapshot = Snapshot()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: Future[str] | None = None
        self._failure: OSError | None = None
        self._state: dict[str, Any] = {}

    def begin(self, step: int, state: dict[str, Any], *, replace: bool) -> bool:
        """Wait for the save before; return True if `save` is to save one after `step` steps.

        Args:
            replace: one of this step that is there already; otherwise that one stays.
        """
        self._end_of_save()
        folder = checkpoint_folder(self._checkpoints, step)
        if folder.exists() and not replace:
            return False
        try:
            self._state = {"step": step, **state, **self._make_durable()}
        except OSError as error:
            self._failed(error)
            return False
        return True

    def save(self, model: nn.Module, optimizers: Optimizers) -> None:
        """Save the checkpoint that has begun: copy everything now, and write it in the thread."""
        self._snapshot.take(model, optimizers)
        self._under_way = self._thread.submit(self._write, self._state)

    def _write(self, state: dict[str, Any]) -> str:
        folder = checkpoint_folder(self._checkpoints, state["step"])
        write_checkpoint(folder, self._snapshot, state)
        saved = f"after {state['step']} steps: saved {folder}"
        try:
            prune_checkpoints(self._checkpoints, self._keep)
        except OSError as error:
            return f"{saved}; warning: older ones could not be deleted: {error}"
        return saved

    def poll(self) -> None:
        """Say how the save under way has ended, if it has."""
        if self._under_way and self._under_way.done():
            self._end_of_save()

    def finish(self) -> None:
        """Wait for the save under way.

        Raises:
            OSError: the last save has failed.
        """
        self._end_of_save()
        if self._failure:
            raise self._failure

    def _end_of_save(self) -> None:
        if self._under_way is None:
            return
        ending, self._under_way = self._under_way, None
        try:
            saved = ending.result()
        except OSError as error:
            self._failed(error)
        else:
            self._failure = None
            self._say(saved)

    def _failed(self, error: OSError) -> None:
        self._failure = error
        known = translate_error(error)
        self._say(
            f"warning: no checkpoint could be saved: {known.problem if known else error}; "
            "training goes on, and tries again when the next one is due"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._thread.shutdown()
