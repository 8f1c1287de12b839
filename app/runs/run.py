"""A run's folder: what it was started with, what it has measured, and where it continues."""

import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from app.errors import UserError
from app.files import AppendOnlyFile, read_json
from app.runs.checkpoint import Checkpoint, checkpoint_folder
from app.runs.checkpoints import (
    checkpoint_steps,
    latest_valid,
    no_valid_checkpoint,
    remove_partial_checkpoints,
)
from app.runs.metrics import MetricsLog, read_metrics
from app.runs.samples import format_samples, read_samples
from app.runs.tensorboard import EventLog


@dataclass(frozen=True)
class Identity:
    """What a run must keep to remain the same run: its data and its model.

    Attributes:
        dataset_fingerprint: of the tokens
        settings: name -> value of what a run cannot change on its way: the model and the order
            of the data; rates and the number of steps it can
    """

    dataset_fingerprint: str
    settings: dict[str, Any]

    def check_matches(self, run_dir: Path, state: dict[str, Any]) -> None:
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


def refuse_existing(folder: Path, resume: Literal["auto", "never"]) -> None:
    """Raise UserError if the folder has a run, and none is to be continued."""
    steps = checkpoint_steps(folder / "checkpoints")
    if resume == "never" and (steps or (folder / "settings.json").exists()):
        raise UserError(
            f"{folder} exists, with {f'{steps[-1]} steps' if steps else 'no checkpoint'}",
            "set TRAIN_RUN_NAME to a new name, or TRAIN_RESUME=auto to continue it",
        )


def find_checkpoint(
    folder: Path, identity: Identity, resume: Literal["auto", "never"]
) -> Checkpoint | None:
    """Return the last good checkpoint, where a run continues; None for a new run.

    A damaged one is named, and put aside under another name.

    Args:
        folder: of the run; no other process may be saving there.
        resume: `never` refuses a run that has been started.

    Raises:
        UserError: the folder holds another run, or no checkpoint that is good.
    """
    checkpoints = folder / "checkpoints"
    remove_partial_checkpoints(checkpoints)
    steps = checkpoint_steps(checkpoints)
    refuse_existing(folder, resume)
    found, damages = latest_valid(checkpoints)
    if damages and found is None:
        raise no_valid_checkpoint(folder, damages)
    if found:
        identity.check_matches(folder, found.state)
    for damaged, step in zip(damages, reversed(steps), strict=False):
        path = checkpoint_folder(checkpoints, step)
        aside = path.with_name(f"{path.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        print(f"warning: {damaged.problem}; it is now {aside.name}", file=sys.stderr, flush=True)
    return found


class RunLogger:
    """Writes metrics, samples and events of a run. One process owns it.

    Args:
        folder: of the run.
        continued: the checkpoint that the run continues from; what is later is cut off.
    """

    def __init__(self, folder: Path, continued: Checkpoint | None) -> None:
        self._folder = folder
        metrics = folder / "metrics.jsonl"
        if continued is None and metrics.exists() and metrics.stat().st_size:
            # Nothing to continue from, but perhaps all that is left of a long run.
            taken = len(list(folder.glob("metrics.before-*.jsonl")))
            metrics.rename(folder / f"metrics.before-{taken + 1}.jsonl")
        lines = continued.state["metrics_lines"] if continued else 0
        self._metrics = MetricsLog(metrics, lines)
        self._events: EventLog | None = None
        samples_bytes = continued.state["samples_bytes"] if continued else 0
        self._samples = AppendOnlyFile(folder / "samples.txt", samples_bytes)

    def add_metrics(self, record: dict[str, Any]) -> None:
        """Append a step's line to metrics.jsonl, and its points to TensorBoard's events.

        Raises:
            OSError: the disk is full or fails; the line is kept, and written later.
        """
        if self._events is None:
            # Not before a step is done: a start that fails changes nothing. If it fails, the next
            # step tries again.
            with suppress(OSError):
                self._events = EventLog(
                    self._folder / "tensorboard",
                    read_metrics(self._folder / "metrics.jsonl"),
                    read_samples(self._folder / "samples.txt"),
                    read_json(self._folder / "settings.json", "start the run again"),
                )
        if self._events is not None:
            self._events.append(record)
        self._metrics.append(record)

    def add_samples(self, step: int, texts: list[str]) -> None:
        """Append what the model wrote after `step` steps to samples.txt.

        Raises:
            OSError: as add_metrics.
        """
        if self._events is not None:
            self._events.append_samples(step, texts)
        self._samples.append(format_samples(step, texts))

    def fsync(self) -> dict[str, int]:
        """Make everything durable, and return what a checkpoint's state says of it."""
        return {"metrics_lines": self._metrics.sync(), "samples_bytes": self._samples.sync()}
