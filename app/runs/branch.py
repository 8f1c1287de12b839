"""A new run that begins with a checkpoint of another one."""

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from app.errors import UserError
from app.files import atomic_file, atomic_folder, filename_in_errors, read_bytes
from app.runs.checkpoint import TENSOR_FILES, Checkpoint, checkpoint_folder
from app.runs.checkpoint_state import CorruptCheckpoint
from app.runs.checkpoints import checkpoint_steps, latest_checkpoint, state_of
from app.runs.folder import RunFolder, RunIdentity
from app.runs.metrics import first_steps

# Parts of the identity that a branch may change.
_FREE = ("dataset_fingerprint", "seed", "shuffle")
# A run that is training may delete a checkpoint while its hashes are compared.
_TRIES = 3
_RESTORE = "restore that file from a backup, or set {} to another RUN@STEP"
_BRANCH = "TRAIN_BRANCH_FROM"


def origin_of(checkpoint: Checkpoint) -> str:
    """Return RUN@STEP."""
    return f"{checkpoint.folder.parents[1].name}@{checkpoint.step}"


def begin_branch(run: RunFolder, identity: RunIdentity, checkpoint: Checkpoint) -> None:
    """Begin a run, which is locked by this process, with a checkpoint of another run.

    The checkpoint's folder gets its name last: until then, this can be done again.

    Raises:
        UserError: the other run has deleted the checkpoint.
    """
    state = replace(
        checkpoint.state,
        identity=identity.to_json(),
        origin=origin_of(checkpoint),
        planned_steps=None,
    )
    with atomic_folder(checkpoint_folder(run.checkpoints, state.step)) as partial:
        for file in TENSOR_FILES:
            _link_or_copy(checkpoint.folder / file, partial / file)
        state.write(partial)
        for path, content in zip((run.metrics, run.samples), _logs_until(checkpoint), strict=True):
            with atomic_file(path) as opened:
                opened.write(content)


def find_branch_point(run: RunFolder, identity: RunIdentity, max_steps: int) -> Checkpoint | None:
    """Find where a run branches from another; None if it does not, or has a checkpoint already.

    Args:
        run: not locked yet, because locking creates its folder.
        max_steps: steps of the whole run.

    Raises:
        UserError: there is no such checkpoint, or it cannot be continued as this run.
    """
    name, _, step = (identity.branch_from or "").partition("@")
    if name == run.path.name:
        raise UserError(
            f"TRAIN_BRANCH_FROM={identity.branch_from}: a run cannot branch from itself",
            "set TRAIN_RUN_NAME to the name of the new run",
        )
    if not name or checkpoint_steps(run.checkpoints):
        return None
    if run.settings.exists():
        raise identity.other_origin(run.path, None)
    source = RunFolder(run.path.with_name(name))
    checkpoint = find_checkpoint(
        source, int(step) if step else None, _BRANCH, TENSOR_FILES, use_best=False
    )
    start = checkpoint.state.cooldown_start
    if not step and start is not None and start < checkpoint.step:
        steps = checkpoint_steps(source.checkpoints)
        states = filter(None, (state_of(source.checkpoints, it) for it in steps))
        # By the plan of its time: a time limit may have moved the cool-down forward since.
        before = [
            it.step for it in states if it.cooldown_start is None or it.step <= it.cooldown_start
        ]
        if not before:
            raise UserError(
                f"{source.path} has no checkpoint from before its cool-down, after {start} steps",
                f"add @STEP to TRAIN_BRANCH_FROM, one of: {', '.join(map(str, steps))}",
            )
        checkpoint = find_checkpoint(source, before[-1], _BRANCH, TENSOR_FILES)
    identity.check_initial_weights(source.path, checkpoint.state)
    changes, origin = identity.changes_from(checkpoint.state), origin_of(checkpoint)
    if refused := [words for key, words in changes.items() if key not in _FREE]:
        raise UserError(
            f"{origin} cannot be continued with these settings: {'; '.join(refused)}",
            "set these back, or leave TRAIN_BRANCH_FROM out",
        )
    if checkpoint.step >= max_steps:
        raise UserError(
            f"nothing is left to do after {origin}: TRAIN_MAX_STEPS is {max_steps}",
            "raise TRAIN_MAX_STEPS, the steps of the whole run, or branch from an earlier step",
        )
    # Raises what would otherwise come only once the new run has a folder.
    _logs_until(checkpoint)
    return checkpoint


def find_checkpoint(
    source: RunFolder,
    step: int | None,
    variable: str,
    files: Sequence[str],
    *,
    use_best: bool | None = None,
    tries: int = _TRIES,
) -> Checkpoint:
    """Find a checkpoint of another run, which may be training, as latest_checkpoint does."""
    steps = checkpoint_steps(source.checkpoints)
    try:
        return latest_checkpoint(source.path, step, files, variable, use_best=use_best)
    except UserError as error:
        if tries > 1 and steps != checkpoint_steps(source.checkpoints):
            return find_checkpoint(
                source, step, variable, files, use_best=use_best, tries=tries - 1
            )
        is_corrupt = isinstance(error, CorruptCheckpoint)
        fix = _RESTORE.format(variable) if is_corrupt else error.fix
        raise UserError(error.problem, fix) from None


def _logs_until(checkpoint: Checkpoint) -> tuple[bytes, bytes]:
    """Return metrics.jsonl and samples.txt up to a checkpoint; UserError if steps are missing."""
    source, state = RunFolder(checkpoint.folder.parents[1]), checkpoint.state
    try:
        lines = first_steps(source.metrics, state.metrics_lines)
    except UserError as error:
        raise UserError(error.problem, _RESTORE.format(_BRANCH)) from None
    samples = read_bytes(source.samples) if source.samples.exists() else b""
    return b"".join(line for _, line in lines), samples[: state.samples_bytes]


def _link_or_copy(file: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system has no hard links."""
    with suppress(OSError):
        os.link(file.resolve(), target)
        return
    try:
        with file.open("rb") as opened, filename_in_errors(target), target.open("wb") as copy:
            shutil.copyfileobj(opened, copy)
    except FileNotFoundError:
        problem = f"{file} has been deleted by the run that it belongs to"
        raise UserError(problem, "run the same command again") from None
