"""All checkpoints of a run: which there are, which are good, which stay."""

import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from app.errors import UserError
from app.files import PARTIAL, REPLACED
from app.runs.checkpoint import (
    MODEL_FILE,
    TENSOR_FILES,
    Checkpoint,
    CorruptCheckpoint,
    checkpoint_folder,
    open_checkpoint,
)


def checkpoint_steps(checkpoints: Path) -> list[int]:
    """Steps of the complete checkpoints below a folder, ascending."""
    if not checkpoints.is_dir():
        return []
    names = (re.fullmatch(r"step-(\d{6,})", path.name) for path in checkpoints.iterdir())
    return sorted(int(name[1]) for name in names if name)


def latest_valid(
    checkpoints: Path, files: Iterable[str] = TENSOR_FILES
) -> tuple[Checkpoint | None, list[CorruptCheckpoint]]:
    """The last checkpoint whose files are as they were written, and why later ones are not it.

    Args:
        checkpoints: the folder of a run's checkpoints.
        files: those that are needed.
    """
    damages = []
    for step in reversed(checkpoint_steps(checkpoints)):
        try:
            checkpoint = open_checkpoint(checkpoint_folder(checkpoints, step))
            checkpoint.verify(files)
        except CorruptCheckpoint as error:
            damages.append(error)
        else:
            return checkpoint, damages
    return None, damages


def no_valid_checkpoint(run_dir: Path, damages: list[CorruptCheckpoint]) -> UserError:
    """The error of a run all of whose checkpoints are damaged."""
    return UserError(
        f"{run_dir} has no good checkpoint: {'; '.join(one.problem for one in damages)}",
        "put the files back from a copy, or set TRAIN_RUN_NAME to a new name to start again",
    )


def latest_checkpoint(run_dir: Path, step: int | None = None) -> Checkpoint:
    """Find the last checkpoint of a run with a good model, or the one after `step` steps.

    Later ones that are damaged are named.

    Raises:
        UserError: there is none.
    """
    checkpoints = run_dir / "checkpoints"
    steps = checkpoint_steps(checkpoints)
    if not run_dir.is_dir():
        known = sorted(path.name for path in run_dir.parent.glob("*/") if path.is_dir())
        raise UserError(
            f"there is no run {run_dir}",
            f"set TRAIN_RUN_NAME to one of: {', '.join(known)}" if known else "train first",
        )
    if not steps:
        raise UserError(f"{run_dir} has no checkpoint yet", "let train reach its first one")
    if step is None:
        checkpoint, damages = latest_valid(checkpoints, (MODEL_FILE,))
        if checkpoint is None:
            raise no_valid_checkpoint(run_dir, damages)
        for damaged in damages:
            print(f"warning: {damaged.problem}", file=sys.stderr, flush=True)
        return checkpoint
    if step not in steps:
        raise UserError(
            f"{run_dir} has no checkpoint of step {step}",
            f"choose one of: {', '.join(map(str, steps))}",
        )
    checkpoint = open_checkpoint(checkpoint_folder(checkpoints, step))
    checkpoint.verify((MODEL_FILE,))
    return checkpoint


def prune_checkpoints(checkpoints: Path, keep: int) -> None:
    """Delete all but the last `keep` checkpoints and the one of the lowest held-out loss."""
    steps = checkpoint_steps(checkpoints)
    losses = {step: loss for step in steps if (loss := _val_loss(checkpoints, step)) is not None}
    best = min(losses, key=lambda step: losses[step], default=None)
    for step in steps[:-keep]:
        if step != best:
            folder = checkpoint_folder(checkpoints, step)
            folder.rename(folder.with_name(folder.name + PARTIAL))
    remove_partial_checkpoints(checkpoints)


def _val_loss(checkpoints: Path, step: int) -> float | None:
    try:
        return open_checkpoint(checkpoint_folder(checkpoints, step)).val_loss
    except UserError:
        return None


def remove_partial_checkpoints(checkpoints: Path) -> None:
    """Delete what a killed save or pruning has left; no other process may be saving."""
    for before in checkpoints.glob(f"*{REPLACED}"):
        folder = before.with_name(before.name.removesuffix(REPLACED))
        if not folder.exists():
            before.rename(folder)
    for partial in checkpoints.glob(f"*{PARTIAL}"):
        shutil.rmtree(partial)
