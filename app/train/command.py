"""The command `train`: checks what can fail without torch, then trains or launches processes."""

import os
import sys
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path

from app.containers import python_command
from app.data.dataset import open_dataset
from app.distributed.launch import launch, launched, processes_to_launch
from app.errors import ExitWithCode
from app.progress import print_line
from app.runs.checkpoints import checkpoint_steps
from app.runs.folder import RunFolder
from app.settings.settings import Settings
from app.train.init_from import with_initial_weights
from app.train.start import find_branch, hellaswag_questions, open_training_data, plan_start


def start_training(settings: Settings) -> None:
    """Train in this process, or launch one process per GPU with this process's command line.

    Raises:
        ExitWithCode: the launched processes have ended; a failure has been printed.
    """
    # Before torch is imported; launched processes inherit it.
    cache_dir = settings.general.data_dir / "cache"
    tag_cache(cache_dir)
    keep_bytecode(cache_dir)
    with ExitStack() as stack:
        dataset, start = None, None
        if not launched():
            if settings.train.init_from:
                # Without a dataset nothing is downloaded.
                open_dataset(settings.train_dataset_dir, settings.general.data_dir)
            settings, weights = with_initial_weights(settings)
            dataset = open_training_data(settings)
            run = RunFolder(settings.run_dir)
            processes = processes_to_launch(settings.train.processes, settings.train.device)
            # Several processes take seconds to start, only to find that the run is finished.
            steps = checkpoint_steps(run.checkpoints)
            if processes > 1 and steps and steps[-1] >= settings.train.max_steps:
                with run.lock():
                    if plan_start(settings, dataset, run) is None:
                        return
            if processes > 1:
                hellaswag_questions(settings)
                command = [*python_command()[1:], *sys.argv[1:]]
                raise ExitWithCode(launch(command, processes, settings.train.max_restarts))
            branch = find_branch(settings, dataset.fingerprint)
            stack.enter_context(run.lock())
            start = plan_start(settings, dataset, run, branch, weights)
            if start is None:
                return
            print_line("starting torch")
        # Importing torch takes seconds, so everything that can fail without it has been checked.
        from app.train.main import train

        train(settings, dataset, start)


def tag_cache(cache_dir: Path) -> None:
    """Mark a folder as a cache: backups skip it, and prepare reads no text from it.

    Source: the Cache Directory Tagging Specification, bford.info/cachedir.
    """
    with suppress(OSError):
        cache_dir.mkdir(parents=True, exist_ok=True)
        (cache_dir / "CACHEDIR.TAG").write_text("Signature: 8a477f597d28d172789f06886806bc55\n")


def keep_bytecode(cache_dir: Path) -> None:
    """Cache bytecode in `cache_dir`, for children too, if torch was installed without it.

    uv installs none, and PYTHONDONTWRITEBYTECODE, which is meant for source folders, is often set:
    each start would then compile thousands of modules. Call it before torch is imported.
    """
    torch = find_spec("torch")
    if torch and torch.cached and not Path(torch.cached).exists() and not sys.pycache_prefix:
        sys.pycache_prefix = str((cache_dir / "bytecode").absolute())
        sys.dont_write_bytecode = False
        os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
