"""A user at a shell: an empty folder, none of the developer's settings, and what they type."""

import os
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from app.cli.process import run

REPOSITORY = Path(__file__).parent.parent


def copy_checkout(folder: Path) -> None:
    """Copy what a clone would hold into a new folder."""
    environments = {".venv", ".venv-cluster", ".venv-lm-eval", ".venv-sky", ".venv-trackers"}
    made_here = {".git", ".env", "data", *environments}
    for place in REPOSITORY.iterdir():
        if place.name in made_here or place.name.endswith("_cache"):
            continue
        if place.is_dir():
            shutil.copytree(place, folder / place.name)
        else:
            shutil.copy(place, folder)


def settle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder."""
    monkeypatch.chdir(folder)


@contextmanager
def moved_in(workshop: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work in a copy of a folder; torch is left as it was found."""
    shutil.copytree(workshop, folder, dirs_exist_ok=True)
    settle(folder, monkeypatch)
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


def type_in(line: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run `NAME=VALUE … COMMAND …` in this process and return the exit code."""
    variables, arguments = _split(line)
    with monkeypatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        return run(arguments)


def run_really(line: str, largest_file: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run `NAME=VALUE … COMMAND …` as `python -m app COMMAND …`.

    A disk that fills up is what `largest_file`, in bytes, stands for.
    """
    given, arguments = _split(line)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limits = (soft if largest_file is None else largest_file, hard)
    return subprocess.run(
        [sys.executable, "-m", "app", *arguments],
        env=os.environ | given,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits),
    )


def _split(line: str) -> tuple[dict[str, str], list[str]]:
    words = shlex.split(line)
    first = next((i for i, word in enumerate(words) if not word.partition("=")[0].isupper()), 0)
    return dict(word.split("=", 1) for word in words[:first]), words[first:]
