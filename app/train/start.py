"""The start of a run: what can be decided, or fail, before torch is imported."""

import os
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field

from app.containers import SWEEP
from app.data.dataset import Dataset, open_dataset
from app.data.hellaswag import Question, provide_questions, read_questions
from app.errors import UserError
from app.progress import print_line
from app.runs.branch import begin_branch, find_branch_point, origin_of
from app.runs.checkpoint import Checkpoint
from app.runs.checkpoint_state import CheckpointState
from app.runs.checkpoints import checkpoint_steps
from app.runs.code import changed_files, name_changed, patch_name
from app.runs.folder import RunFolder, RunIdentity
from app.settings import own_text
from app.settings.next_command import command_for_run
from app.settings.settings import Settings
from app.train.advice import Advice, advise, advise_on_disk
from app.train.init_from import InitialWeights, are_published
from app.train.lr_schedule import LRSchedule
from app.train.time_limit import planned_steps


@dataclass(frozen=True)
class Start:
    """Decisions that rank 0 makes before the run and broadcasts to the other ranks.

    Attributes:
        identity: the run's identity
        checkpoint: the checkpoint that the run continues from; None for a new run
        questions: HellaSwag's, if they are to be answered
        weights: what a new run begins with; None for random ones
    """

    identity: RunIdentity
    checkpoint: Checkpoint | None
    questions: list[Question] = field(default_factory=list)
    weights: InitialWeights | None = None


def open_training_data(settings: Settings) -> Dataset:
    """Open the dataset.

    Raises:
        UserError: there is none, it is damaged, or it is shorter than one sequence.
    """
    dataset = open_dataset(settings.train_dataset_dir, settings.general.data_dir)
    dataset.num_sequences(settings.model.context_length)
    return dataset


def open_same_data(settings: Settings, identity: RunIdentity) -> Dataset:
    """Open the dataset on a rank other than 0; UserError if DATA_DIR is not rank 0's."""
    dataset = open_dataset(settings.train_dataset_dir, settings.general.data_dir)
    if dataset.fingerprint != identity.dataset_fingerprint:
        problem = f"{dataset.folder} differs from the first machine's"
    elif not settings.run_dir.is_dir():
        problem = f"{settings.run_dir} exists on the first machine but not on this one"
    else:
        return dataset
    raise UserError(problem, "mount one folder as DATA_DIR on all machines")


def find_branch(settings: Settings, dataset_fingerprint: str) -> Checkpoint | None:
    """Find where a new run branches from another, as app.runs.branch.find_branch_point."""
    identity = run_identity(settings, dataset_fingerprint)
    return find_branch_point(RunFolder(settings.run_dir), identity, settings.train.max_steps)


def plan_start(
    settings: Settings,
    dataset: Dataset,
    run: RunFolder,
    branch: Checkpoint | None = None,
    weights: InitialWeights | None = None,
    *,
    restarted: bool = False,
) -> Start | None:
    """Find where the run continues, and print it. Return None if all its steps are completed.

    Args:
        run: locked by this process.
        branch: the checkpoint of another run with which a new one begins.
        weights: those with which a new run begins.
        restarted: a launcher has restarted the processes after one was lost.

    Raises:
        UserError: the folder holds a different run, or the file of HellaSwag's questions is wrong.
        NetworkError: they could not be downloaded.
    """
    cfg, identity = settings.train, run_identity(settings, dataset.fingerprint)
    # Printed first, because comparing the hashes of a checkpoint may take seconds.
    print_line(_describe(dataset, settings))
    if line := own_text.note(settings):
        print_line(line)
    resume = "auto" if restarted else cfg.resume
    if branch and not checkpoint_steps(run.checkpoints):
        begin_branch(run, identity, branch)
        changes = identity.changes_from(branch.state).values()
        print_line("; ".join([f"{run.path}: a branch of {origin_of(branch)}", *changes]))
        resume = "auto"
    checkpoint = run.resume_from(identity, resume)
    steps = (checkpoint and planned_steps(settings, checkpoint.state)) or cfg.max_steps
    if checkpoint and checkpoint.step >= steps and not checkpoint.state.pending:
        print_line(f"{run.path} is finished: all {checkpoint.step} steps are done")
        print_next_step(settings)
        return None
    new = f"new, with the weights of {weights.name}" if weights else "new"
    print_line(f"{run.path}: " + (f"continues at step {checkpoint.step}" if checkpoint else new))
    jump = cooldown_warning(settings, checkpoint.state) if checkpoint else None
    other = other_code_warning(checkpoint) if checkpoint else None
    warn(filter(None, (held_out_warning(dataset, settings), jump, other)))
    if not restarted:
        tokens, held_out = (sum(map(len, shards)) for shards in (dataset.train, dataset.val))
        step, published = checkpoint.step if checkpoint else 0, are_published(settings)
        warn(advise(cfg, settings.model, tokens, held_out, step, are_published=published))
        warn(advise_on_disk(cfg, settings.model, free_for_checkpoints(run)))
    weights = None if checkpoint else weights
    return Start(identity, checkpoint, hellaswag_questions(settings), weights)


def warn(advice: Iterable[Advice]) -> None:
    """Print each problem with what to do about it, as a line on standard error."""
    for problem, fix in advice:
        print(f"warning: {problem}; {fix}", file=sys.stderr, flush=True)


def free_for_checkpoints(run: RunFolder) -> int:
    """Return the bytes that a run's checkpoints may take, including those that exist."""
    existing = next(path for path in (run.path, *run.path.absolute().parents) if path.exists())
    saved = (path.stat().st_size for path in run.checkpoints.rglob("*") if path.is_file())
    return shutil.disk_usage(existing).free + sum(saved)


def print_next_step(settings: Settings) -> None:
    """Print the line that ends a run that is finished; a sweep ends with one of its own."""
    if SWEEP not in os.environ:
        sample, report = (command_for_run(settings, name) for name in ("sample", "report"))
        print_line(f"next: {sample}; {report}")


def hellaswag_questions(settings: Settings) -> list[Question]:
    """Return HellaSwag's questions, downloaded if need be; none if the run answers none."""
    if not settings.train.hellaswag_every:
        return []
    if settings.train.hellaswag_file is None:
        provide_questions(settings.hellaswag_file)
    return read_questions(settings.hellaswag_file)


def held_out_warning(dataset: Dataset, settings: Settings) -> Advice | None:
    """Return why the run will have no held-out loss, and what to do; None if that is intended."""
    manifest = dataset.manifest
    is_intended = not settings.train.val_every or (manifest is not None and not dataset.val)
    lack = None if is_intended else dataset.lack_of_held_out_text(settings.model.context_length)
    return lack and (f"no held-out loss will be measured: {lack[0]}", lack[1])


def cooldown_warning(settings: Settings, before: CheckpointState) -> Advice | None:
    """Return a warning if the learning rate jumps back up, else None."""
    began = before.cooldown_start
    planned = planned_steps(settings, before)
    schedule = LRSchedule.from_settings(settings.train, before.warmup_steps, planned)
    if began is None or not began < before.step < schedule.max_steps:
        return None
    if schedule.decay_start <= began:
        return None
    return (
        f"the run has been cooling down since step {began}, and its learning rate jumps back up "
        f"to {schedule.learning_rate(before.step):.2e}",
        "TRAIN_BRANCH_FROM begins a new run from before the cool-down (docs/recipes.md)",
    )


def other_code_warning(checkpoint: Checkpoint) -> Advice | None:
    """Return a warning if code differs from the checkpoint's, else None."""
    changed = changed_files(checkpoint)
    kept = f"the run goes on with it, and {patch_name(checkpoint.step)} records the difference"
    return (f"other code than before: {name_changed(changed)}", kept) if changed else None


def run_identity(settings: Settings, dataset_fingerprint: str) -> RunIdentity:
    """Return what must stay the same for a run with these settings to be the same run."""
    fixed = {"tokens_per_step", "seed", "shuffle", "optimizer"}
    return RunIdentity(
        dataset_fingerprint,
        settings.model.shape() | settings.train.model_dump(include=fixed),
        settings.train.branch_from,
        settings.train.init_from,
    )


def _describe(dataset: Dataset, settings: Settings) -> str:
    cfg, context_length = settings.train, settings.model.context_length
    tokens_per_epoch = context_length * dataset.num_sequences(context_length)
    tokens, held_out = (sum(map(len, shards)) for shards in (dataset.train, dataset.val))
    at_most = "at most " if cfg.max_hours else ""
    return (
        f"{dataset.folder}: {tokens:,} training tokens "
        f"({at_most}{cfg.max_steps * cfg.tokens_per_step / tokens_per_epoch:.2f} epochs in "
        f"{cfg.max_steps} steps), {held_out:,} held out"
    )
