"""A run's folder: where its files are, which run it is, and where it continues."""

import shutil
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from app.errors import UserError
from app.formats import differences
from app.locks import locked
from app.runs.checkpoint import Checkpoint, checkpoint_folder
from app.runs.checkpoint_state import CheckpointState
from app.runs.checkpoints import (
    checkpoint_steps,
    latest_valid,
    no_valid_checkpoint_error,
    remove_partial_checkpoints,
)


@dataclass(frozen=True)
class RunIdentity:
    """The data and settings that must not change while a run continues.

    Attributes:
        dataset_fingerprint: fingerprint of the tokens
        settings: name -> value of the settings that may not change: the model's, the optimizer and
            those that determine the data order. Learning rate and number of steps may change.
        branch_from: RUN or RUN@STEP with which it began; None for any beginning
        init_from: whose weights it began with; None for any
    """

    dataset_fingerprint: str
    settings: dict[str, Any]
    branch_from: str | None = None
    init_from: str | None = None

    def check_matches(self, run_dir: Path, state: CheckpointState) -> None:
        """Raise UserError that names every difference from a checkpoint."""
        origin = state.origin or ""
        if self.branch_from and self.branch_from not in (origin, origin.partition("@")[0]):
            raise self.other_origin(run_dir, state.origin)
        self.check_initial_weights(run_dir, state)
        if changes := self.changes_from(state):
            is_same_version = state.identity.keys() == self.to_json().keys()
            is_same_version |= bool({"architecture", "activation"} & changes.keys())
            to_continue = "set these back" if is_same_version else "use the version that wrote it"
            if state.initial_weights and not self.init_from:
                to_continue = f"set TRAIN_INIT_FROM={state.initial_weights}"
            raise UserError(
                f"{run_dir} holds a different run: {'; '.join(changes.values())}",
                f"set TRAIN_RUN_NAME to a new name, or {to_continue} to continue",
            )

    def check_initial_weights(self, run_dir: Path, state: CheckpointState) -> None:
        """Raise UserError if the run of a checkpoint began with other weights than `init_from`."""
        began, train = state.initial_weights, state.settings.get("train", {})
        # A branch or a tag is recorded as its commit: the same command continues the run.
        if self.init_from in (
            None,
            began,
            train.get("init_from"),
            (began or "").rpartition("@")[0],
        ):
            return
        fix = "leave TRAIN_INIT_FROM out" if began is None else f"set TRAIN_INIT_FROM={began}"
        began = f"with the weights of {began}" if began else "without TRAIN_INIT_FROM"
        raise UserError(
            f"{run_dir} has begun {began}, not with {self.init_from}",
            f"set TRAIN_RUN_NAME to a new name, or {fix} to continue this run",
        )

    def other_origin(self, run_dir: Path, origin: str | None) -> UserError:
        """Return the error of a run that did not begin with `branch_from`."""
        began = f"as a branch of {origin}" if origin else "without TRAIN_BRANCH_FROM"
        return UserError(
            f"{run_dir} has begun {began}, not with {self.branch_from}",
            "set TRAIN_RUN_NAME to a new name, or leave TRAIN_BRANCH_FROM out to continue this run",
        )

    def changes_from(self, state: CheckpointState) -> dict[str, str]:
        """Return the differences from a checkpoint in words, by key of its identity."""
        before, now = state.identity, self.to_json()
        if before.get("architecture") != now.get("architecture"):
            # Settings that only one of the two architectures has are no further difference.
            before, now = ({key: it[key] for key in before if key in now} for it in (before, now))
        elif "activation" in {**before, **now}:
            # It is left out if it is the default.
            before, now = ({"activation": "gelu", **it} for it in (before, now))
        changes = differences(before, now)
        if "dataset_fingerprint" in changes:
            changes["dataset_fingerprint"] = "the dataset holds different tokens"
        return changes

    def to_json(self) -> dict[str, Any]:
        """Return what state.json has under `identity`."""
        return {"dataset_fingerprint": self.dataset_fingerprint, **self.settings}


class RunFolder:
    """The folder of a run.

    Attributes:
        checkpoints: folder of the checkpoints
        metrics: file with a line per step
        samples: file of the texts that the model generated during training
        settings: file of resolved settings, versions and facts about the machine
        tensorboard: folder of TensorBoard's events
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.samples = path / "samples.txt"
        self.settings = path / "settings.json"
        self.tensorboard = path / "tensorboard"

    def lock(self, wait_seconds: float = 0) -> AbstractContextManager[None]:
        """Create the folder, and hold its lock within the block.

        Args:
            wait_seconds: how long to wait for a process that holds it, before UserError.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        return locked(self.path, "train", wait_seconds=wait_seconds)

    def resume_from(
        self, identity: RunIdentity, resume: Literal["auto", "never"]
    ) -> Checkpoint | None:
        """Return the checkpoint from which the run continues; None for a new run.

        A damaged checkpoint is reported, and renamed. No other process may be saving.

        Args:
            identity: identity of the run to continue.
            resume: `never` refuses an existing run.

        Raises:
            UserError: the folder holds a different run, or all its checkpoints are damaged.
        """
        try:
            remove_partial_checkpoints(self.checkpoints)
        except OSError as refusal:
            # Some file systems delete no file that another program has open.
            print(f"warning: cannot be deleted: {refusal}", file=sys.stderr, flush=True)
        self.refuse_existing(resume)
        steps = checkpoint_steps(self.checkpoints)
        checkpoint, corrupt = latest_valid(self.checkpoints)
        if corrupt and checkpoint is None:
            raise no_valid_checkpoint_error(self.path, corrupt)
        if checkpoint:
            identity.check_matches(self.path, checkpoint.state)
        for error, step in zip(corrupt, reversed(steps), strict=False):
            damaged = checkpoint_folder(self.checkpoints, step)
            aside = damaged.with_name(f"{damaged.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            damaged.rename(aside)
            print(f"warning: {error.problem}; it is now {aside.name}", file=sys.stderr, flush=True)
        return checkpoint

    def refuse_existing(self, resume: Literal["auto", "never"]) -> None:
        """Raise UserError if the folder already holds a run and `resume` is never."""
        steps = checkpoint_steps(self.checkpoints)
        if resume == "never" and (steps or self.settings.exists()):
            raise UserError(
                f"{self.path} exists, with {f'{steps[-1]} steps' if steps else 'no checkpoint'}",
                "set TRAIN_RUN_NAME to a new name, or TRAIN_RESUME=auto to continue it",
            )

    def last_saved(self) -> Path | None:
        """Return the folder of the last checkpoint, from which the run would continue."""
        steps = checkpoint_steps(self.checkpoints)
        return checkpoint_folder(self.checkpoints, steps[-1]) if steps else None
