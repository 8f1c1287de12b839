"""A run's folder: what it was started with, what it has measured, and where it continues."""

import os
import platform
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from torch import nn

from app.errors import SAME_REQUEST_SECONDS, ExitCode, UserError
from app.files import write_json
from app.train.checkpoint import (
    Checkpoint,
    checkpoint_folder,
    checkpoint_steps,
    open_checkpoint,
    prune_checkpoints,
    remove_partial_checkpoints,
    save_checkpoint,
)
from app.train.metrics import MetricsLog, read_metrics
from app.train.optimizer import Optimizers
from app.train.tensorboard import EventLog

_PACKAGES = ("torch", "numpy", "tiktoken", "datasets", "pydantic-settings", "safetensors")


@dataclass(frozen=True)
class Identity:
    """What makes a run this run; it cannot continue with another.

    Attributes:
        dataset_fingerprint: of the tokens
        settings: name -> value of what a run cannot change on its way: the model and the order
            of the data; rates and the number of steps it can
    """

    dataset_fingerprint: str
    settings: dict[str, Any]

    def refuse_difference(self, run_dir: Path, state: dict[str, Any]) -> None:
        """Raise UserError that names what differs from a checkpoint's state."""
        before = state["identity"]
        now = self.as_state()
        differences = [
            f"{name} was {before.get(name)} and is now {now.get(name)}"
            for name in (*before, *(now.keys() - before.keys()))
            if name != "dataset_fingerprint" and before.get(name) != now.get(name)
        ]
        if before["dataset_fingerprint"] != self.dataset_fingerprint:
            differences.append("the dataset holds other tokens")
        if differences:
            raise UserError(
                f"{run_dir} is another run: {'; '.join(differences)}",
                "set TRAIN_RUN_NAME to a new name, or set these back to continue",
            )

    def as_state(self) -> dict[str, Any]:
        """For state.json."""
        return {"dataset_fingerprint": self.dataset_fingerprint, **self.settings}


class Run:
    """The folder of a run that this process owns.

    Args:
        folder: created if it is missing; what is there must be the same run.
        identity: of the run.
        keep_checkpoints: how many of the latest stay.
        resume: `never` refuses a run that has a checkpoint.

    Raises:
        UserError: the folder holds another run.
    """

    def __init__(
        self,
        folder: Path,
        identity: Identity,
        keep_checkpoints: int,
        resume: Literal["auto", "never"],
    ) -> None:
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        remove_partial_checkpoints(self.checkpoints)
        self.resumed_from = self._find_checkpoint(identity, resume)
        self._identity = identity
        self._keep = keep_checkpoints
        metrics = folder / "metrics.jsonl"
        if self.resumed_from is None and metrics.exists() and metrics.stat().st_size:
            # Nothing to continue from, but perhaps all that is left of a long run.
            metrics.replace(folder / "metrics.before.jsonl")
        self._metrics = MetricsLog(metrics, self.first_step)
        self._events: EventLog | None = None
        self._samples = (folder / "samples.txt").open("ab")
        self._samples.truncate(self.resumed_from.state["samples_bytes"] if self.resumed_from else 0)

    def _find_checkpoint(
        self, identity: Identity, resume: Literal["auto", "never"]
    ) -> Checkpoint | None:
        steps = checkpoint_steps(self.checkpoints)
        if resume == "never" and (steps or (self.folder / "settings.json").exists()):
            raise UserError(
                f"{self.folder} exists, with {f'{steps[-1]} steps' if steps else 'no checkpoint'}",
                "set TRAIN_RUN_NAME to a new name, or TRAIN_RESUME=auto to continue it",
            )
        if not steps:
            return None
        checkpoint = open_checkpoint(checkpoint_folder(self.checkpoints, steps[-1]))
        identity.refuse_difference(self.folder, checkpoint.state)
        return checkpoint

    @property
    def first_step(self) -> int:
        """The step to begin with: how many are completed."""
        return self.resumed_from.step if self.resumed_from else 0

    @property
    def windows_consumed(self) -> int:
        """Windows that all completed steps have consumed."""
        return int(self.resumed_from.state["windows_consumed"]) if self.resumed_from else 0

    def save(
        self, step: int, model: nn.Module, optimizers: Optimizers, state: dict[str, Any]
    ) -> Path:
        """Write the checkpoint after `step` steps, and drop the oldest beyond those kept."""
        folder = checkpoint_folder(self.checkpoints, step)
        if step not in checkpoint_steps(self.checkpoints):
            self._metrics.sync()
            os.fsync(self._samples.fileno())
            state["samples_bytes"] = self._samples.tell()
            identity = {"identity": self._identity.as_state(), "versions": versions()}
            save_checkpoint(folder, model, optimizers, {"step": step, **state, **identity})
            prune_checkpoints(self.checkpoints, self._keep)
        return folder

    def add_metrics(self, record: dict[str, Any]) -> None:
        """Append a step's line to metrics.jsonl, and its points to TensorBoard's events."""
        if self._events is None:
            # Not before a step is done: a start that fails changes nothing.
            history = read_metrics(self.folder / "metrics.jsonl")
            self._events = EventLog(self.folder / "tensorboard", history)
        self._metrics.append(record)
        self._events.append(record)

    def add_samples(self, step: int, texts: list[str]) -> None:
        """Append what the model wrote after `step` steps to samples.txt."""
        for text in texts:
            heading = f"----- after {step} steps -----"
            self._samples.write(f"{heading}\n{text}\n\n".encode("utf-8", "replace"))
        self._samples.flush()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter for the numbers."""
    return {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES}


def git_revision() -> str | None:
    """The commit of the program, with `-dirty` if files differ; None outside a git checkout.

    An image has the commit it was built from in a file; whether files differed is not known there.
    """
    built_from = Path(__file__).parents[2] / "revision"
    if built_from.exists():
        return built_from.read_text(encoding="utf-8").strip() or None
    git = shutil.which("git")
    if git is None:
        return None
    described = subprocess.run(
        [
            git,
            "-C",
            str(Path(__file__).parent),
            "describe",
            "--always",
            "--dirty",
            "--abbrev=40",
            "--exclude",
            "*",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or None


def write_run_settings(folder: Path, settings: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write settings.json: resolved settings, versions, and facts about device and model."""
    everything = {"settings": settings, "versions": versions(), "git_revision": git_revision()}
    write_json(folder / "settings.json", everything | facts)


@dataclass
class StopRequest:
    """Whether a signal has asked the program to stop; the loop looks between micro-batches."""

    exit_code: ExitCode | None = field(default=None)
    _asked_at: float = 0.0

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        code = ExitCode.SIGINT if number == signal.SIGINT else ExitCode.SIGTERM
        if self.exit_code is not None:
            if time.monotonic() - self._asked_at > SAME_REQUEST_SECONDS:
                os._exit(code)
            return
        self.exit_code, self._asked_at = code, time.monotonic()
        # A handler may run in the middle of a print, where another print is an error.
        os.write(2, b"stopping: saving a checkpoint first; a second signal leaves at once\n")


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn SIGINT, SIGTERM and SIGHUP (a lost connection) into a request, within the block."""
    request = StopRequest()
    before = {
        one: signal.signal(one, request._ask)
        for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        # What nohup ignores stays ignored.
        if signal.getsignal(one) is not signal.SIG_IGN
    }
    try:
        yield request
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
