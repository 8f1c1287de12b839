"""The run that a command uses if the user has named none: the latest."""

import sys

from app.runs.checkpoints import latest_runs
from app.settings.settings import Settings


def with_latest_run(settings: Settings) -> Settings:
    """Return the settings with a run that exists: the named one, or else the latest saved one.

    The latest is taken, and that is said on standard error, if no run is named and the one that
    train would begin with these settings has not begun.
    """
    run_dir = settings.run_dir
    if settings.train.run_name is None:
        runs = [run for run, _ in latest_runs(run_dir.parent)]
        if runs and run_dir not in runs and not (run_dir / "metrics.jsonl").exists():
            run_dir = runs[0]
            line = f"{run_dir}: the latest run; TRAIN_RUN_NAME chooses another"
            print(line, file=sys.stderr, flush=True)
    train = settings.train.model_copy(update={"run_name": run_dir.name})
    return settings.model_copy(update={"train": train})
