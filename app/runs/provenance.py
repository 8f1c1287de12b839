"""settings.json: where a run's numbers come from: settings, versions, machine, data."""

import os
import platform
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from app import __version__
from app.data.dataset import Dataset
from app.runs.code import git_revision, source

_PACKAGES = ("torch", "numpy", "tiktoken", "datasets", "pydantic-settings", "safetensors")


def run_metadata(
    settings: dict[str, Any],
    device: dict[str, Any],
    dataset: Dataset,
    *,
    processes: int,
    parameters: int,
    origin: str | None = None,
    planned_steps: int | None = None,
    initial_weights: str | None = None,
) -> dict[str, Any]:
    """Return the content of settings.json.

    Args:
        settings: all settings, without secrets.
        device: what is known about the device.
        parameters: size of the model.
        origin: RUN@STEP, where the run began, if that was in another run.
        planned_steps: number of steps, if a time limit has decided it.
        initial_weights: see CheckpointState.
    """
    decided = {
        "origin": origin,
        "planned_steps": planned_steps,
        "initial_weights": initial_weights,
    }
    return {
        "settings": settings,
        "versions": versions(),
        "git_revision": git_revision(),
        "source": {name: it for name, it in source().items() if name != "revision"},
        "machine": {"system": platform.platform(), "cpus": os.cpu_count()},
        "device": device,
        "dataset": _dataset_metadata(dataset),
        "processes": processes,
        "parameters": parameters,
        **{name: value for name, value in decided.items() if value is not None},
    }


def versions() -> dict[str, str]:
    """Return the versions of this program, of Python and of the packages that affect results.

    A package that is absent is left out: training needs no `datasets`.
    """
    known = {"gpt-compose": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            known[name] = version(name)
    return known


def _dataset_metadata(dataset: Dataset) -> dict[str, Any]:
    """Return what settings.json keeps about the dataset, which may be deleted later."""
    manifest = asdict(dataset.manifest) if dataset.manifest else {}
    return {
        "folder": dataset.folder.name,
        "fingerprint": dataset.fingerprint,
        "train_tokens": sum(map(len, dataset.train)),
        "val_tokens": sum(map(len, dataset.val)),
        "shards": len(dataset.train) + len(dataset.val),
        **{key: manifest[key] for key in ("source", "tokenizer", "settings", "counts") if manifest},
    }
