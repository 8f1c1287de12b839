"""Trackio and Weights & Biases as they store a run, and a run without its tracker."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from app.runs import tracking
from app.runs.checkpoint import Checkpoint
from app.runs.folder import RunFolder
from app.runs.metrics import StepRecord, read_metrics
from app.runs.run_logger import RunLogger
from tests.process_tree import children
from tests.runs.test_run_logger import checkpoint
from tests.test_files import file_size_limit
from tests.train.processes import Process

pytestmark = pytest.mark.trackers

CHECKOUT = Path(__file__).parents[2]
PYTHON = CHECKOUT / ".venv-trackers" / "bin" / "python"
KINDS = pytest.mark.parametrize("kind", ("trackio", "wandb"))
METADATA = {"settings": {"train": {"learning_rate": 0.1, "betas": [0.9, 0.95], "seed": None}}}
CONFIG = {"train.learning_rate": 0.1, "train.betas": [0.9, 0.95]}


def record(step: int, loss: float) -> StepRecord:
    val_loss = loss + 0.1 if step % 2 else None
    return StepRecord(step, 32 * (step + 1), loss, lr=0.1, step_ms=1000.0, val_loss=val_loss)


class Log:
    """A run's logger, and the warnings that it prints."""

    def __init__(self, run: RunFolder, kind: str, begins_at: Checkpoint | None) -> None:
        self.lines: list[str] = []
        self.logger = RunLogger(run, begins_at, dict(METADATA), self.lines.append, kind)

    def add(self, *steps: int, loss: float = 4.5) -> None:
        for step in steps:
            self.logger.add_step(record(step, loss))

    def process(self) -> subprocess.Popen[bytes]:
        tracker = self.logger._tracker
        assert tracker is not None
        assert tracker._process is not None
        return tracker._process

    def end(self) -> None:
        self.logger.close()


@pytest.fixture(autouse=True)
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process, and the trackers' that it starts, find the packages."""
    assert PYTHON.exists(), "make test-trackers makes its environment"
    (site_packages,) = PYTHON.parents[1].glob("lib/python*/site-packages")
    monkeypatch.syspath_prepend(site_packages)
    # Importing them may take longer than the end of a run is to wait for.
    monkeypatch.setattr(tracking, "_MOST_SECONDS_TO_FINISH", 300)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "runs" / "small")
    run.path.mkdir(parents=True)
    return run


@pytest.fixture
def log(run: RunFolder) -> Iterator[Callable[..., Log]]:
    opened = []

    def open_log(kind: str, begins_at: Checkpoint | None = None) -> Log:
        opened.append(Log(run, kind, begins_at))
        return opened[-1]

    yield open_log
    for it in opened:
        it.end()


def stored(kind: str, data_dir: Path) -> list[dict[str, Any]]:
    """Return name, config and history of each run that a tracker has stored."""
    if kind == "wandb":
        files = data_dir.glob("runs/*/wandb/offline-run-*/*.wandb")
        command = [str(PYTHON), str(Path(__file__).with_name("wandb_history.py"))]
        runs = [json.loads(subprocess.check_output([*command, str(file)])) for file in files]
    else:
        with closing(sqlite3.connect(data_dir / "trackio" / "gpt-compose.db")) as database:
            configs = database.execute("SELECT run_id, run_name, config FROM configs").fetchall()
            rows = database.execute("SELECT run_id, step, metrics FROM metrics ORDER BY id")
            points = [(run, {"_step": step, **json.loads(it)}) for run, step, it in rows]
        assert {run for run, _ in points} == {run for run, _, _ in configs}
        runs = [
            {
                "name": name,
                "config": json.loads(config),
                "history": [point for run, point in points if run == identity],
            }
            for identity, name, config in configs
        ]
    for it in runs:
        it["config"] = {key: it["config"][key] for key in it["config"] if key[0] != "_"}
        it["history"] = [
            {key: point[key] for key in point if key == "_step" or key[0] != "_"}
            for point in it["history"]
        ]
    return runs


def curves(run: RunFolder) -> list[dict[str, float]]:
    return [{"_step": record.step, **record.curves()} for record in read_metrics(run.metrics)]


@KINDS
def test_a_continued_run_is_one_run_with_each_point_once(
    kind: str, run: RunFolder, log: Callable[..., Log]
) -> None:
    first = log(kind)
    first.add(0, 1, 2, 3)
    lengths = first.logger.sync()
    first.add(4, 5)
    first.end()
    data_dir = run.path.parents[1]
    (before,) = stored(kind, data_dir)
    assert (before["name"], before["config"]) == ("small", CONFIG)
    assert before["history"] == curves(run)
    assert len(before["history"]) == 6

    second = log(kind, checkpoint(run, *lengths))
    second.add(4, 5, 6, loss=3.5)
    second.end()
    (after,) = stored(kind, data_dir)
    assert after["history"] == curves(run)
    assert [point["loss/train"] for point in after["history"]] == [4.5] * 4 + [3.5] * 3
    assert {**after, "history": before["history"]} == before
    assert first.lines == second.lines == []


@KINDS
def test_a_tracker_that_is_killed_is_one_warning(
    kind: str, run: RunFolder, log: Callable[..., Log]
) -> None:
    tracked = log(kind)
    tracked.add(0)
    process = tracked.process()
    process.kill()
    process.wait()
    tracked.add(1, 2)
    tracked.end()
    (line,) = tracked.lines
    beginning = f"warning: training continues without a tracker: {kind} has died (SIGKILL)"
    assert line.startswith(beginning)
    assert len(curves(run)) == 3


@pytest.mark.parametrize(
    ("kind", "variables", "words"),
    (
        ("trackio", {"TRACKIO_SERVER_URL": "nowhere"}, "must be a full URL"),
        ("trackio", {"TRACKIO_DIR": "/proc/trackio"}, "/proc/trackio"),
        ("wandb", {"WANDB_MODE": "online"}, "No API key configured"),
    ),
)
def test_a_tracker_that_cannot_start_is_one_warning(
    kind: str,
    variables: dict[str, str],
    words: str,
    run: RunFolder,
    log: Callable[..., Log],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    tracked = log(kind)
    tracked.add(0, 1)
    tracked.end()
    (line,) = tracked.lines
    assert f"{kind} has died (exit code 1): " in line
    assert words in line
    assert len(curves(run)) == 2


def test_a_full_disk_of_trackio_is_one_warning(run: RunFolder, log: Callable[..., Log]) -> None:
    with file_size_limit(20_000):
        tracked = log("trackio")
        tracked.add(0, 1)
    tracked.end()
    (line,) = tracked.lines
    assert "trackio failed to flush metric logs" in line
    assert len(curves(run)) == 2


@KINDS
def test_the_end_waits_only_so_long_for_a_tracker_that_hangs(
    kind: str, log: Callable[..., Log], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_MOST_SECONDS_TO_FINISH", 0.1)
    tracked = log(kind)
    tracked.add(0)
    process = tracked.process()
    process.send_signal(signal.SIGSTOP)
    tracked.end()
    assert process.returncode == -signal.SIGKILL
    (line,) = tracked.lines
    assert "has died (SIGKILL)" in line


@KINDS
def test_training_goes_on_when_its_tracker_is_killed_and_another_sends_the_whole_run(
    kind: str, data_dir: Path
) -> None:
    path = f"{CHECKOUT}:{sys.path[0]}"
    few = {"TRAIN_SAMPLE_EVERY": 0, "TRAIN_VAL_EVERY": 10, "TRAIN_CHECKPOINT_EVERY": 0}
    process = Process(data_dir, TRAIN_TRACKER=kind, TRAIN_MAX_STEPS=20, PYTHONPATH=path, **few)
    process.wait_for("step:3/")
    (tracker,) = children()[process.process.pid]
    os.kill(int(tracker.name), signal.SIGKILL)
    code, output = process.end()
    assert (code, output.count("warning:")) == (0, 1)
    assert f"warning: training continues without a tracker: {kind} has died (SIGKILL)" in output
    run = RunFolder(process.run_dir)
    subprocess.run(
        [sys.executable, "-m", "app.runs.send_to_tracker", kind, str(run.path)],
        env=os.environ | {"PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        check=True,
    )
    (found,) = stored(kind, data_dir)
    assert found["history"] == curves(run)
    assert len(found["history"]) == 20
    assert found["config"]["train.tracker"] == kind
