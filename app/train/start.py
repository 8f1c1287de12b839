"""Where a run begins: its data, its folder, its checkpoint. All of it is known without torch."""

import os
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from app.containers import started_by_script
from app.data.dataset import Dataset, open_dataset
from app.data.sequences import num_sequences
from app.distributed.launch import launch, launched, processes_to_launch
from app.errors import ExitWithCode, UserError
from app.files import locked
from app.runs.checkpoint import Checkpoint
from app.runs.run import Identity, find_checkpoint
from app.settings.settings import Settings
from app.train.console import print_line


@dataclass(frozen=True)
class Start:
    """Decisions that rank 0 makes before the run, for all ranks."""

    identity: Identity
    checkpoint: Checkpoint | None


def start_training(settings: Settings) -> None:
    """Train in this process, or start one process per GPU. What can fail without torch fails first.

    The processes to start get this process's command line.

    Raises:
        ExitWithCode: the processes have ended, and have printed why.
    """
    # Before torch is imported; the processes to start inherit it.
    keep_bytecode(settings.general.data_dir / "cache")
    with ExitStack() as stack:
        start = None
        if not launched():
            dataset = open_training_data(settings)
            processes = processes_to_launch(settings.train)
            if processes > 1:
                program = [sys.argv[0]] if started_by_script() else ["-m", "app"]
                command = [*program, *sys.argv[1:]]
                raise ExitWithCode(launch(command, processes, settings.train.max_restarts))
            start = plan_start(settings, dataset, stack)
            if start is None:
                return
            print_line("starting torch")
        # Importing torch takes seconds.
        from app.train.trainer import train

        train(settings, start)


def keep_bytecode(cache_dir: Path) -> None:
    """Keep this process's and its children's bytecode in `cache_dir` if torch came without.

    uv installs none, and PYTHONDONTWRITEBYTECODE, which is meant for the places of the sources, is
    often set: then each start would compile thousands of modules. Call it before torch is imported.
    """
    torch = find_spec("torch")
    if torch and torch.cached and not Path(torch.cached).exists() and not sys.pycache_prefix:
        sys.pycache_prefix = str((cache_dir / "bytecode").absolute())
        sys.dont_write_bytecode = False
        os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def open_training_data(settings: Settings) -> Dataset:
    """Open the dataset.

    Raises:
        UserError: there is none, it is damaged, or it holds not even one window.
    """
    dataset = open_dataset(settings.train_dataset_dir)
    training_windows(dataset, settings.model.context_length)
    return dataset


def training_windows(dataset: Dataset, context_length: int) -> int:
    """Return the number of windows in an epoch; UserError if there is not even one."""
    windows = num_sequences(sum(map(len, dataset.train)), context_length)
    if windows == 0:
        raise UserError(
            f"{dataset.folder} holds less than one window of training tokens: "
            f"{context_length + 1} are needed (MODEL_CONTEXT_LENGTH and one more)",
            "prepare more text, or lower MODEL_CONTEXT_LENGTH",
        )
    return windows


def plan_start(
    settings: Settings, dataset: Dataset, owned: ExitStack, *, restarted: bool = False
) -> Start | None:
    """Take the run's folder, find where the run begins, and print it; None if it is finished.

    Args:
        owned: what gives the folder back at its end.
        restarted: a launcher has started the processes once more, after one was lost.

    Raises:
        UserError: another process has the folder, or it holds another run.
    """
    chosen, run_dir = settings.train, settings.run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    owned.enter_context(locked(run_dir, "train", waits=restarted))
    identity = identity_of(settings, dataset.fingerprint)
    # First: the search compares the hashes of a checkpoint, which may take seconds.
    print_line(_described(dataset, settings))
    checkpoint = find_checkpoint(run_dir, identity, "auto" if restarted else chosen.resume)
    if checkpoint and checkpoint.step >= chosen.max_steps and not checkpoint.state["left"]:
        print_line(f"{run_dir} is finished: {checkpoint.step} steps are done")
        return None
    print_line(f"{run_dir}: " + (f"continues at step {checkpoint.step}" if checkpoint else "new"))
    return Start(identity, checkpoint)


def _described(dataset: Dataset, settings: Settings) -> str:
    chosen, length = settings.train, settings.model.context_length
    epoch = length * training_windows(dataset, length)
    tokens, held_out = (sum(map(len, shards)) for shards in (dataset.train, dataset.val))
    return (
        f"{dataset.folder}: {tokens:,} training tokens "
        f"({chosen.max_steps * chosen.tokens_per_step / epoch:.2f} epochs in "
        f"{chosen.max_steps} steps), {held_out:,} held out"
    )


def identity_of(settings: Settings, dataset_fingerprint: str) -> Identity:
    """Return what makes a run with these settings, on a dataset, this run."""
    order = {"tokens_per_step", "seed", "shuffle", "optimizer"}
    return Identity(
        dataset_fingerprint,
        settings.model.model_dump() | settings.train.model_dump(include=order),
    )
