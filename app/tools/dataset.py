"""The dataset of a run."""

from pathlib import Path
from typing import Any

from app.files import json_value
from app.runs.folder import RunFolder
from app.settings.settings import Settings


def recorded(settings: Settings, *path: str) -> Any:
    """Return a value from the nested objects of the run's settings.json; None if it is missing."""
    return json_value(RunFolder(settings.run_dir).settings, *path)


def dataset_of(settings: Settings) -> Path:
    """Return the dataset's folder: TRAIN_DATASET_DIR, or else the one that the run was trained on.

    Without a record of that, or if it is gone, it is the one that prepare would write.
    """
    places = (("settings", "train", "dataset_dir"), ("settings", "prepare", "out_dir"))
    names = (recorded(settings, *place) for place in (*places, ("dataset", "folder")))
    name = next(filter(None, names), None)
    if settings.train.dataset_dir is None and isinstance(name, str):
        folder = settings.general.data_dir / name
        if folder.is_dir():
            return folder
    return settings.train_dataset_dir
