"""Sends a run to a tracker: what metrics.jsonl holds, and what is added until standard input ends.

python -m app.runs.send_to_tracker trackio|wandb RUN_FOLDER
"""

import json
import os
import select
import shutil
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from app.formats import named_values
from app.runs.folder import RunFolder
from app.runs.metrics import StepRecord

_PROJECT = "gpt-compose"
_READ_EVERY_SECONDS = 1.0
# Nobody waits for this process any longer if training was killed.
_MOST_SECONDS_TO_FINISH = 60


def start_trackio(folder: Path, config: dict[str, Any]) -> Any:
    """Start a run in place of the one that an earlier process has begun; return the package."""
    os.environ.setdefault("TRACKIO_DIR", str(folder.absolute().parents[1] / "trackio"))
    import trackio

    # It turns its failures into warnings.
    warnings.showwarning = _end_with_warning
    with suppress(ValueError):  # there is no such project yet
        for earlier in trackio.Api().runs(_PROJECT):
            if earlier.name == folder.name:
                earlier.delete()
    trackio.init(project=_PROJECT, name=folder.name, config=config)
    return trackio


def start_wandb(folder: Path, config: dict[str, Any]) -> Any:
    """Start a run in place of the one that an earlier process has begun; return the package."""
    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_PROJECT", _PROJECT)
    import wandb

    earlier = sorted((folder / "wandb").glob("*run-*-*"))
    # Without `resume`, a run replaces what is stored under its ID, here and on the server.
    wandb.init(
        dir=folder,
        id=earlier[-1].name.rpartition("-")[2] if earlier else None,
        name=folder.name,
        config=config,
        settings=wandb.Settings(console="off"),
    )
    for path in earlier:
        shutil.rmtree(path)
    return wandb


def _end_with_warning(message: Warning | str, *_where: Any, **_more: Any) -> None:
    print(message, file=sys.stderr, flush=True)
    # At a usual exit trackio prints another line, and tracking.py shows the last one.
    os._exit(1)


def follow(metrics: Path) -> Iterator[StepRecord]:
    """Yield the records of metrics.jsonl and those that are added, until standard input ends."""
    rest, is_over = b"", False
    with metrics.open("rb") as file:
        while not is_over:
            is_over = bool(select.select([sys.stdin], [], [], _READ_EVERY_SECONDS)[0])
            *lines, rest = (rest + file.read()).split(b"\n")
            yield from (StepRecord(**json.loads(line)) for line in lines)


def send(kind: str, run: RunFolder) -> None:
    """Send a run's settings and curves."""
    os.nice(10)
    config = named_values(json.loads(run.settings.read_bytes()))
    tracker = {"trackio": start_trackio, "wandb": start_wandb}[kind](run.path, config)
    for record in follow(run.metrics):
        tracker.log(record.curves(), step=record.step)
    signal.alarm(_MOST_SECONDS_TO_FINISH)
    tracker.finish()


if __name__ == "__main__":
    send(sys.argv[1], RunFolder(Path(sys.argv[2])))
