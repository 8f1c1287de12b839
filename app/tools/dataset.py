"""The dataset of a run."""

from pathlib import Path
from typing import Any

from app.errors import UserError
from app.files import read_json
from app.runs.folder import RunFolder
from app.settings.settings import Settings


def recorded(settings: Settings) -> dict[str, Any]:
    """Return the content of the run's settings.json; nothing if it cannot be read."""
    path = RunFolder(settings.run_dir).settings
    try:
        return read_json(path, "restore it") if path.is_file() else {}
    except UserError:
        return {}


def dataset_of(settings: Settings) -> Path:
    """Return the dataset's folder: TRAIN_DATASET_DIR, or else the one that the run was trained on.

    Without a record of that, or if it is gone, it is the one that prepare would write.
    """
    data_dir, run = settings.general.data_dir, recorded(settings)
    if settings.train.dataset_dir is None and run:
        own = run["settings"]
        name = own["train"]["dataset_dir"] or own["prepare"]["out_dir"] or run["dataset"]["folder"]
        if (data_dir / name).is_dir():
            return data_dir / name
    return settings.train_dataset_dir
