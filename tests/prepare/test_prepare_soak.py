"""Faults at all points of a run, and kills at random moments: minutes of them."""

import errno
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from app.errors import ExitCode
from tests.conftest import Say
from tests.faults import Fault
from tests.prepare.prepare_process import Preparation, Unbroken, parquet_source, unbroken

WORKERS = (1, 2, 4)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    source = parquet_source(tmp_path_factory.mktemp("source") / "rows")
    return unbroken(tmp_path_factory.mktemp("unbroken"), source)


def new_place(tmp_path: Path) -> Path:
    """The one before is not worth its room."""
    shutil.rmtree(tmp_path / "place", ignore_errors=True)
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


@pytest.mark.soak
@pytest.mark.parametrize(
    ("sends", "fails", "code"),
    (
        (signal.SIGKILL, None, -signal.SIGKILL),
        (signal.SIGTERM, None, ExitCode.SIGTERM),
        (None, errno.ENOSPC, ExitCode.EXHAUSTED),
        (None, errno.EROFS, ExitCode.USER),
    ),
    ids=("SIGKILL", "SIGTERM", "ENOSPC", "EROFS"),
)
def test_a_fault_at_every_point_equals_unbroken(
    small: Unbroken,
    tmp_path: Path,
    say: Say,
    sends: signal.Signals | None,
    fails: int | None,
    code: int,
) -> None:
    # What tidies up does not fail; after the last other call nothing can.
    last = max(point.number for point in small.points if sends or point.kind != "unlink")
    for point in small.points[:last]:
        preparation = small.again(new_place(tmp_path))
        ended = preparation.run(WORKERS[point.number % 3], Fault(point.number, sends, fails))
        assert ended.code == code, (point, ended)
        assert "Traceback" not in ended.error, (point, ended)
        assert sends == signal.SIGKILL or not list(preparation.out.glob("*.partial")), point
        small.is_reached_by(preparation, WORKERS[(point.number + 1) % 3])
    say(f"{last} points")


@pytest.mark.soak
def test_killed_at_every_point_of_a_continuation_equals_unbroken(
    small: Unbroken, tmp_path: Path, say: Say
) -> None:
    """Twice in a row: first in the middle of a shard."""
    torn = [point for point in small.points if (point.kind, point.what) == ("torn", "shard")]
    first = Fault(torn[len(torn) // 2].number, signal.SIGKILL)

    def killed_once() -> Preparation:
        preparation = small.again(new_place(tmp_path))
        assert preparation.run(fault=first).code == -signal.SIGKILL
        return preparation

    points = small.is_reached_by(killed_once()).points
    for point in points:
        preparation = killed_once()
        workers = WORKERS[point.number % 3]
        ended = preparation.run(workers, Fault(point.number, signal.SIGKILL))
        assert ended.code == -signal.SIGKILL, (point, ended)
        small.is_reached_by(preparation)
    say(f"{len(points)} points")


@pytest.mark.parametrize(
    ("kills", "rows"), ((3, 60), pytest.param(200, 1500, marks=pytest.mark.soak))
)
def test_killed_at_random_moments_equals_unbroken(
    tmp_path: Path, say: Say, kills: int, rows: int
) -> None:
    """Sixty rows a file make 30 shards, 1500 make 500; what is complete too early is begun anew."""
    settings = parquet_source(tmp_path / "rows", rows, shard_size=1000)
    begun = time.monotonic()
    clean = unbroken(new_place(tmp_path), settings)
    span = time.monotonic() - begun
    draw = random.Random(kills)
    phases = Counter[str]()
    preparation, completed = clean.again(new_place(tmp_path)), 0
    while phases.total() < kills:
        process = preparation.start(draw.choice(WORKERS))
        try:
            process.communicate(timeout=draw.uniform(0, span))
        except subprocess.TimeoutExpired:
            process.kill()
        ended = preparation.end(process)
        if ended.code == -signal.SIGKILL:
            phases[phase(preparation)] += 1
            span *= 1.05
            continue
        # However fast the machine is by now, two of three are killed before their end.
        span *= 0.9
        assert ended.code == 0, ended
        clean.is_reached_by(preparation)
        preparation, completed = clean.again(new_place(tmp_path)), completed + 1
    clean.is_reached_by(preparation)
    summary = ", ".join(f"{count} {name}" for name, count in phases.most_common())
    say(f"{kills} kills in {time.monotonic() - begun:.0f} s, {completed + 1} folders: {summary}")


def phase(preparation: Preparation) -> str:
    """Return what a killed process was doing."""
    points, within = preparation.points()
    if not points:
        return "while it started"
    return f"in {points[-1].kind} of a {points[-1].what}" if within else "between two calls"
