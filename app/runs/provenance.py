"""Where a run's numbers come from: settings, versions, machine, data."""

import os
import platform
import shutil
import subprocess
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from app.data.dataset import Dataset
from app.data.manifest import Manifest
from app.files import write_json

_PACKAGES = ("torch", "numpy", "tiktoken", "datasets", "pydantic-settings", "safetensors")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter for the numbers.

    A package that is absent, or does not tell, is left out: train needs no `datasets`.
    """
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def dataset_facts(dataset: Dataset) -> dict[str, Any]:
    """Return the facts that settings.json keeps of the dataset, which may be deleted later."""
    manifest = Manifest.load(dataset.folder)
    told = {} if manifest is None else asdict(manifest)
    kept = {name: told[name] for name in ("source", "tokenizer", "settings", "counts") if told}
    return {
        "folder": dataset.folder.name,
        "fingerprint": dataset.fingerprint,
        "train_tokens": sum(shard.size for shard in dataset.train),
        "val_tokens": sum(shard.size for shard in dataset.val),
        "shards": len(dataset.train) + len(dataset.val),
        **kept,
    }


def git_revision() -> str | None:
    """The commit of the program, with `-dirty` if files differ; None outside a git checkout.

    An image has the commit it was built from in a file; whether files differed is not known there.
    """
    built_from = Path(__file__).parents[2] / "revision"
    if built_from.exists():
        return built_from.read_text(encoding="utf-8").strip() or None
    git = shutil.which("git")
    if git is None:
        return None
    words = [git, "-C", str(Path(__file__).parent), *["describe", "--always", "--dirty"]]
    words += ["--abbrev=40", "--exclude", "*"]
    described = subprocess.run(words, capture_output=True, text=True, check=False)
    return described.stdout.strip() or None


def write_run_settings(folder: Path, settings: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write settings.json: resolved settings, versions, and facts about machine and model."""
    machine = {"system": platform.platform(), "cpus": os.cpu_count()}
    everything = {
        "settings": settings,
        "versions": versions(),
        "git_revision": git_revision(),
        "machine": machine,
    }
    write_json(folder / "settings.json", everything | facts)
