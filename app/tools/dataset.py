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
    run = recorded(settings)
    own = run.get("settings", {})
    names = (
        own.get("train", {}).get("dataset_dir"),
        own.get("prepare", {}).get("out_dir"),
        run.get("dataset", {}).get("folder"),
    )
    name = next(filter(None, names), None)
    if settings.train.dataset_dir is None and name:
        folder = settings.general.data_dir / name
        if folder.is_dir():
            return folder
    return settings.train_dataset_dir
