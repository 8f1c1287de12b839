"""The checkpoints of a run: the folder `checkpoints/`, with one folder for each."""

import re
import shutil
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from app.errors import UserError
from app.files import PARTIAL, REPLACED
from app.runs.checkpoint import (
    MODEL_FILE,
    TENSOR_FILES,
    Checkpoint,
    checkpoint_folder,
    open_checkpoint,
)
from app.runs.checkpoint_state import CheckpointState, CorruptCheckpoint


def checkpoint_steps(checkpoints: Path) -> list[int]:
    """Return the steps of the complete checkpoints in a folder, ascending."""
    if not checkpoints.is_dir():
        return []
    names = (re.fullmatch(r"step-(\d{6,})", path.name) for path in checkpoints.iterdir())
    return sorted(int(name[1]) for name in names if name)


def latest_valid(
    checkpoints: Path, files: Iterable[str] = TENSOR_FILES
) -> tuple[Checkpoint | None, list[CorruptCheckpoint]]:
    """Find the latest intact checkpoint, and the errors of newer damaged ones, newest first.

    Args:
        checkpoints: the folder of a run's checkpoints.
        files: the files that are needed.
    """
    corrupt = []
    for step in reversed(checkpoint_steps(checkpoints)):
        try:
            checkpoint = open_checkpoint(checkpoint_folder(checkpoints, step))
            checkpoint.verify(files)
        except CorruptCheckpoint as error:
            corrupt.append(error)
        else:
            return checkpoint, corrupt
    return None, corrupt


def no_valid_checkpoint_error(run_dir: Path, corrupt: list[CorruptCheckpoint]) -> UserError:
    """Return the error of a run whose checkpoints are all damaged."""
    return UserError(
        f"{run_dir} has no intact checkpoint: {'; '.join(error.problem for error in corrupt)}",
        "restore the files from a backup, or set TRAIN_RUN_NAME to a new name to start again",
    )


def latest_runs(runs_dir: Path) -> list[tuple[Path, list[int]]]:
    """Return the folders of the runs that have checkpoints, and their steps, the latest first."""
    runs = []
    for folder in runs_dir.glob("*/checkpoints"):
        if steps := checkpoint_steps(folder):
            # The checkpoint may be pruned, or the run deleted, at this moment.
            with suppress(OSError):
                saved = checkpoint_folder(folder, steps[-1]).stat().st_mtime
                runs.append((saved, folder.parent, steps))
    return [(run, steps) for _, run, steps in sorted(runs, reverse=True)]


def missing_run_error(run_dir: Path, variable: str | None = "TRAIN_RUN_NAME") -> UserError:
    """Return the error for a run that does not exist; it names those that do.

    Args:
        variable: the setting that names the run; None if it is an argument.
    """
    return UserError(
        f"there is no run {run_dir}",
        _name_another(run_dir, variable) or "train first, or correct DATA_DIR",
    )


def _name_another(run_dir: Path, variable: str | None) -> str:
    """Return the advice to name a run that has checkpoints; empty if there is none."""
    runs = sorted(run.name for run, _ in latest_runs(run_dir.parent))
    name = f"set {variable} to" if variable else "name"
    return f"{name} one of: {', '.join(runs)}" if runs else ""


def latest_checkpoint(
    run_dir: Path,
    step: int | None = None,
    files: Iterable[str] = (MODEL_FILE,),
    variable: str = "TRAIN_RUN_NAME",
    *,
    use_best: bool | None = None,
) -> Checkpoint:
    """Find the last checkpoint of a run whose files are valid, or the one after `step` steps.

    Args:
        variable: the setting that names the run.
        use_best: take the one with the lowest held-out loss in place of the last; None: as the run
            was trained (TRAIN_USE_BEST). That, and later ones that are damaged, are reported on
            standard error.

    Raises:
        UserError: there is none.
    """
    checkpoints = run_dir / "checkpoints"
    steps = checkpoint_steps(checkpoints)
    if not run_dir.is_dir():
        raise missing_run_error(run_dir, variable)
    if not steps:
        other = _name_another(run_dir, variable)
        fix = f"let train reach its first one{other and f', or {other}'}"
        raise UserError(f"{run_dir} has no checkpoint yet", fix)
    if step is None:
        checkpoint, corrupt = latest_valid(checkpoints, files)
        if checkpoint is None:
            raise no_valid_checkpoint_error(run_dir, corrupt)
        for error in corrupt:
            print(f"warning: {error.problem}", file=sys.stderr, flush=True)
        if use_best is None:
            use_best = checkpoint.state.settings.get("train", {}).get("use_best")
        return (use_best and _best(checkpoint, files)) or checkpoint
    if step not in steps:
        raise UserError(
            f"{run_dir} has no checkpoint of step {step}",
            f"choose one of: {', '.join(map(str, steps))}",
        )
    checkpoint = open_checkpoint(checkpoint_folder(checkpoints, step))
    checkpoint.verify(files)
    return checkpoint


def _best(last: Checkpoint, files: Iterable[str]) -> Checkpoint | None:
    """Return the valid checkpoint with the lowest held-out loss; None if the last one is it."""
    checkpoints, loss = last.folder.parent, last.state.val_loss
    losses = {step: val_loss_of(checkpoints, step) for step in checkpoint_steps(checkpoints)}
    # The last one was not measured if the run was stopped between two measurements.
    lower = {
        step: known
        for step, known in losses.items()
        if known is not None and (loss is None or known < loss)
    }
    for step in sorted(lower, key=lambda step: lower[step]):
        with suppress(CorruptCheckpoint):
            best = open_checkpoint(checkpoint_folder(checkpoints, step))
            best.verify(files)
            note = f"of {last.folder.parents[1].name}, step {step} has the lowest held-out loss: "
            of_last = "was not measured" if loss is None else f"{loss:.4f}"
            note += f"{lower[step]:.4f}, and the last, {last.step}, {of_last}"
            print(note, file=sys.stderr, flush=True)
            return best
    return None


def prune_checkpoints(checkpoints: Path, keep: int) -> None:
    """Delete all but the last `keep` checkpoints, the best, and those from before a cool-down.

    The best has the lowest held-out loss; a longer run can branch from before the cool-down.
    """
    steps = checkpoint_steps(checkpoints)
    states = {step: state for step in steps if (state := state_of(checkpoints, step))}
    losses = {step: it.val_loss for step, it in states.items() if it.val_loss is not None}
    kept = {min(losses, key=lambda step: losses[step], default=None)}
    starts = {step: it.cooldown_start for step, it in states.items() if it.cooldown_start}
    kept |= {step for step, start in starts.items() if step == start}
    # A time limit may have moved the cool-down to before steps that were done.
    kept.add(max((step for step, start in starts.items() if step <= start), default=None))
    for step in steps[:-keep]:
        if step not in kept:
            folder = checkpoint_folder(checkpoints, step)
            folder.rename(folder.with_name(folder.name + PARTIAL))
    remove_partial_checkpoints(checkpoints)


def val_loss_of(checkpoints: Path, step: int) -> float | None:
    """Return the held-out loss of a checkpoint; None if it is unknown or the checkpoint damaged."""
    state = state_of(checkpoints, step)
    return state.val_loss if state else None


def state_of(checkpoints: Path, step: int) -> CheckpointState | None:
    """Return the state of a checkpoint; None if it is damaged."""
    try:
        return open_checkpoint(checkpoint_folder(checkpoints, step)).state
    except UserError:
        return None


def remove_partial_checkpoints(checkpoints: Path) -> None:
    """Delete what an interrupted save or prune left behind. No other process may be saving."""
    for before in checkpoints.glob(f"*{REPLACED}"):
        folder = before.with_name(before.name.removesuffix(REPLACED))
        if not folder.exists():
            before.rename(folder)
    for partial in checkpoints.glob(f"*{PARTIAL}"):
        shutil.rmtree(partial)
