"""Kills at exact points of a run's writing, a full disk, and signals in every phase."""

import errno
import os
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from app.errors import ExitCode
from app.prepare.pipeline import prepare
from app.prepare.spec import DatasetSpec, TextSource
from app.runs.checkpoint import open_checkpoint
from tests.conftest import Say
from tests.faults import Fault, Faults, Point
from tests.mounts import small_tmpfs
from tests.train.processes import Process, Start, assert_same_run, measured, run_to_end

pytestmark = pytest.mark.processes
RANDOM_KILLS = 100


@dataclass
class Saving:
    """Runs of ten steps that save after 4, 8 and 10, and may fail at any point of a save."""

    data_dir: Path
    faults: Faults
    points: list[Point]

    def run(self, name: str, fault: Fault | None = None) -> tuple[int, str]:
        """Train the run until it is finished or a fault ends it."""
        variables = self.faults.environment(fault)
        return Process(self.data_dir, **variables, TRAIN_RUN_NAME=name).end()

    def assert_continues(self, name: str) -> None:
        """Train the run to its end, and assert that it equals the unbroken one."""
        code, output = self.run(name)
        assert code == 0, output
        assert_same_run(self.data_dir / "runs" / name, self.data_dir / "runs" / "unbroken")
        shutil.rmtree(self.data_dir / "runs" / name)


@pytest.fixture(scope="module")
def saving(tmp_path_factory: pytest.TempPathFactory, text_shards: Path) -> Saving:
    data_dir = tmp_path_factory.mktemp("saving") / "data"
    data_dir.mkdir()
    (data_dir / "text").symlink_to(text_shards)
    saving = Saving(data_dir, Faults(data_dir / "runs"), [])
    code, output = saving.run("unbroken")
    assert code == 0, output
    saving.points = saving.faults.points()[0]
    return saving


def kind_of(point: Point) -> tuple[str, str]:
    """Return call and file without run and step; tensors have temporary names at first."""
    file = re.sub(r"^[^/]*/?", "", point.file)
    return point.kind, re.sub(r"\.tmp\w+", "tensors", re.sub(r"step-\d+", "step", file))


def last_of_each(points: list[Point]) -> list[Point]:
    """Return a point of each kind in the last save, which also prunes."""
    return list({kind_of(point): point for point in points if "checkpoints" in point.file}.values())


@pytest.mark.slow
def test_killed_at_each_kind_of_point_of_a_save_equals_unbroken(saving: Saving) -> None:
    points = last_of_each(saving.points)
    kinds = {kind for kind, _ in map(kind_of, points)}
    assert {"write", "torn", "fsync", "rename", "unlink"} <= kinds
    # A kill at another point leaves the same files as a kill at one of these.
    representative = [point for point in points if point.kind in ("torn", "rename")]
    for point in representative:
        code, output = saving.run("killed", Fault(point.number, signal.SIGKILL))
        assert code == -signal.SIGKILL, (point, output)
        saving.assert_continues("killed")


@pytest.mark.soak
def test_killed_at_every_point_equals_unbroken(saving: Saving, say: Say) -> None:
    for point in saving.points:
        code, output = saving.run("killed", Fault(point.number, signal.SIGKILL))
        # Two threads race, so that the number of the last points varies.
        assert code == -signal.SIGKILL or point.number > len(saving.points) - 3, (point, output)
        # Once more, in the continued run.
        again = min(point.number, random.Random(point.number).randrange(1, len(saving.points)))
        saving.run("killed", Fault(again, signal.SIGKILL))
        saving.assert_continues("killed")
    say(f"{len(saving.points)} points, and one each in the continuation")


@pytest.mark.soak
def test_killed_at_random_moments_equals_unbroken(data_dir: Path, say: Say) -> None:
    def start(**changes: object) -> Process:
        threads = len(os.sched_getaffinity(0))
        own = {"TRAIN_CHECKPOINT_EVERY": 1, "TRAIN_COMPILE": "true", "OMP_NUM_THREADS": threads}
        return Process(data_dir, **own, **changes)

    unbroken = run_to_end(start, TRAIN_RUN_NAME="unbroken")
    moments, kills, runs = random.Random(0), 0, 0
    while kills < RANDOM_KILLS:
        process = start(TRAIN_RUN_NAME=f"run{runs}")
        try:
            process.process.communicate(timeout=moments.uniform(0, 12))
        except subprocess.TimeoutExpired:
            process.process.kill()
            process.end()
            kills += 1
        else:
            assert_same_run(process.run_dir, unbroken.run_dir)
            runs += 1
    say(f"{kills} kills in {runs} runs")


@dataclass
class Disk:
    """A small disk: a tmpfs or, where mounting is forbidden, the errors of a full disk."""

    data_dir: Path
    fault: dict[str, str]
    make_room: Callable[[], None]


@pytest.fixture
def disk(saving: Saving, tmp_path: Path, text_shards: Path) -> Iterator[Disk]:
    """A disk with room for one checkpoint of ten megabytes but not for two."""
    folder = tmp_path / "disk"
    folder.mkdir()
    for kind in ("-Urm", "-m"):
        with small_tmpfs(folder, "15m", kind) as mounted:
            if mounted.is_mounted():
                (mounted.place / "text").symlink_to(text_shards)
                yield Disk(mounted.place, {}, lambda: mounted.make_room("64m"))
                return
    (folder / "text").symlink_to(text_shards)
    saves = [
        point
        for point in saving.points
        if kind_of(point)[0] == "torn" and "/step-000008" in point.file
    ]
    fault = saving.faults.environment(Fault(saves[0].number, fails=errno.ENOSPC))
    yield Disk(folder, fault | {"FAULTS_FOLDER": str(folder / "runs")}, lambda: None)


@pytest.mark.slow
def test_on_a_full_disk_training_goes_on_and_the_earlier_checkpoint_stays(
    saving: Saving, disk: Disk
) -> None:
    full = Process(disk.data_dir, **disk.fault)
    code, output = full.end()
    assert code == ExitCode.EXHAUSTED, output
    assert "warning: checkpoint not saved: the disk is full" in output
    assert "step:9/10" in output
    assert "error: the disk is full" in output
    assert "Traceback" not in output
    assert [path.name for path in (full.run_dir / "checkpoints").iterdir()] == ["step-000004"]
    disk.make_room()
    continued = Process(disk.data_dir)
    code, output = continued.end()
    assert code == 0, output
    assert_same_run(continued.run_dir, saving.data_dir / "runs" / "unbroken")


@pytest.fixture
def slow_evaluation(data_dir: Path) -> dict[str, object]:
    """Settings of runs that evaluate and sample for seconds."""
    prepare(
        DatasetSpec(TextSource("stdlib"), "long", total_tokens=9000, val_tokens=20_000),
        data_dir / "long",
    )
    return {
        "TRAIN_DATASET_DIR": "long",
        "TRAIN_VAL_TOKENS": 20_000,
        "SAMPLE_MAX_TOKENS": 600,
        "TRAIN_CHECKPOINT_EVERY": 0,
        "TRAIN_KEEP_CHECKPOINTS": 3,
    }


@pytest.mark.slow
def test_a_signal_in_any_phase_loses_nothing_and_the_next_start_does_the_rest(
    start: Start, slow_evaluation: dict[str, object]
) -> None:
    # tests/train/test_trainer_steps.py stops one rank at each place.
    settings = slow_evaluation | {"TRAIN_PROCESSES": 2}
    unbroken = run_to_end(start, **settings, TRAIN_RUN_NAME="unbroken")
    # In an evaluation, in the work that it left pending, in a step, and in the last sample.
    for phase, message in (
        ("step:4/", "step-000005; the same command continues"),
        ("after 5 steps: val_loss", "stopped: no new step to save"),
        ("step:7/", "; the same command continues"),
        ("after 10 steps: val_loss", "step-000010; the same command continues"),
    ):
        stopped = start(**settings)
        stopped.signal_at(phase, signal.SIGTERM)
        code, output = stopped.end()
        assert code == ExitCode.SIGTERM, output
        assert "Traceback" not in output
        assert message in output
    continued = run_to_end(start, **settings)
    assert_same_run(continued.run_dir, unbroken.run_dir)
    last = Path("checkpoints/step-000010")
    losses = [open_checkpoint(run.run_dir / last).state.val_loss for run in (continued, unbroken)]
    assert losses[0] == losses[1] is not None
    assert "is finished: all 10 steps are done" in start(**settings).end()[1]


@pytest.mark.slow
@pytest.mark.parametrize("processes", (1, 2))
def test_a_signal_during_compilation_ends_the_process_at_once(start: Start, processes: int) -> None:
    compiled = {"TRAIN_COMPILE": "true", "TRAIN_PROCESSES": processes}
    stopped = start(**compiled)
    stopped.signal_at("the first step waits for the compiler", signal.SIGTERM)
    code, output = stopped.end()
    assert code == ExitCode.SIGTERM, output
    assert "stopped: no new step to save; the same command continues" in output
    assert "Traceback" not in output
    assert not measured(stopped.run_dir)


@pytest.mark.slow
def test_a_signal_during_a_save_waits_for_it(saving: Saving) -> None:
    point = next(
        point
        for point in saving.points
        if kind_of(point) == ("torn", "checkpoints/step.partial/tensors")
    )
    code, output = saving.run("stopped", Fault(point.number, signal.SIGTERM))
    assert code == ExitCode.SIGTERM, output
    saved = {path.name for path in (saving.data_dir / "runs/stopped/checkpoints").iterdir()}
    assert "step-000004" in saved
    assert not any(name.endswith(".partial") for name in saved)
    saving.assert_continues("stopped")
