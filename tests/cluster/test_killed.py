"""Processes are killed: the dataset is the same, and nothing hangs."""

import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from app.errors import ExitCode
from tests.cluster.cluster_process import Cluster, Slurm, descendants, ended
from tests.conftest import Say
from tests.faults import Fault, Faults
from tests.prepare.prepare_process import Preparation, parquet_source

pytestmark = pytest.mark.cluster

KILLS = 20
# Ray's names of its workers; its other processes are the node.
RAY_WORKERS = ("ray::do_task", "ray::IDLE")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return parquet_source(tmp_path_factory.mktemp("source") / "rows", rows=800)


@pytest.fixture(scope="module")
def single(settings: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    preparation = Preparation(tmp_path_factory.mktemp("single"), settings)
    assert preparation.run().code == 0
    return preparation.out


def workers(process: subprocess.Popen[str]) -> list[int]:
    """Return the processes that do tasks, or are about to."""
    return [
        number
        for number, title in descendants(process.pid)
        if title.startswith(RAY_WORKERS) or "multiprocess" in title
    ]


def until(
    process: subprocess.Popen[str], is_reached: Callable[[], object], seconds: float = 120
) -> bool:
    """Wait until a process has done something; False if it ends before."""
    end = time.monotonic() + seconds
    while not is_reached():
        assert time.monotonic() < end
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.02)
            return False
    return True


def more_than(cluster: Cluster, more: int) -> Callable[[], bool]:
    """Return a function that tells if `more` tasks are done than at this call."""
    done = len(cluster.completions())
    return lambda: len(cluster.completions()) >= done + more


@pytest.mark.parametrize("executor", ("local", "ray"))
def test_twenty_random_kills_do_not_change_the_dataset(
    executor: str, settings: dict[str, str], single: Path, tmp_path: Path, say: Say
) -> None:
    """Four in five are of workers, one is of the process that distributes the tasks."""
    draw = random.Random(executor)
    killed = Counter[str]()
    cluster = Cluster(tmp_path / "0", settings)
    place = 0
    while killed.total() < KILLS:
        cluster.place.mkdir(exist_ok=True)
        process = cluster.start("--executor", executor)
        while killed.total() < KILLS:
            if not until(process, more_than(cluster, draw.randrange(3))):
                break
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=draw.uniform(0, 0.2))
            running = workers(process)
            if killed.total() % 5 == 4:
                killed["driver"] += 1
                process.kill()
                break
            if running:
                killed["worker"] += 1
                with suppress(ProcessLookupError):
                    os.kill(draw.choice(running), signal.SIGKILL)
        run = ended(process)
        # Ray gives itself half a minute to start, which a busy machine may need.
        assert run.returncode in (0, -signal.SIGKILL, ExitCode.NETWORK), run
        if run.returncode == 0:
            cluster.equals(single)
            place += 1
            cluster = Cluster(tmp_path / str(place), settings)
    cluster.place.mkdir(exist_ok=True)
    run = cluster.run("--executor", executor)
    assert run.returncode == 0, run
    cluster.equals(single)
    say(f"{dict(killed)} killed, {place + 1} datasets")


def test_a_killed_task_is_done_again_alone(
    settings: dict[str, str], single: Path, tmp_path: Path
) -> None:
    cluster = Cluster(tmp_path, settings)
    process = cluster.start()
    assert until(process, lambda: len(cluster.completions()) > 3)
    # While all are stopped, no task ends between the look at the folder and the kill.
    for number in (process.pid, *(running := workers(process))):
        os.kill(number, signal.SIGSTOP)
    before = cluster.shards_of_parts()
    assert before
    os.kill(running[-1], signal.SIGKILL)
    for number in (process.pid, *running[:-1]):
        os.kill(number, signal.SIGCONT)
    assert ended(process).returncode == 0
    cluster.equals(single)
    # The first ones hold text that is held out: they are written anew.
    kept = {inode for inode, name in before.items() if not name.startswith("00000")}
    assert kept
    assert kept <= {path.stat().st_ino for path in cluster.out.glob("*.bin")}


def test_a_task_whose_worker_is_always_killed_ends_the_job(
    settings: dict[str, str], tmp_path: Path
) -> None:
    cluster = Cluster(tmp_path, settings | {"PREPARE_WORKERS": "1"})
    process = cluster.start()
    assert until(process, lambda: workers(process))

    def kill() -> bool:
        for number in workers(process):
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        return False

    assert not until(process, kill)
    run = ended(process)
    assert run.returncode == ExitCode.EXHAUSTED, run
    assert "was killed again and again" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("begins_anew", (False, True))
def test_worker_that_was_given_up_changes_nothing_when_it_continues(
    settings: dict[str, str], single: Path, tmp_path: Path, begins_anew: bool
) -> None:
    """Its machine was cut off for a while: another worker has its task, or the plan is another."""
    cluster = Cluster(tmp_path, settings)
    process = cluster.start()
    assert until(process, cluster.completions)
    given_up = workers(process)
    for number in given_up:
        os.kill(number, signal.SIGSTOP)
    process.kill()
    if begins_anew:
        shutil.rmtree(cluster.out)
        again = cluster.start("--task-bytes", "20000")
    else:
        again = cluster.start()
    assert until(again, lambda: len(cluster.completions()) > 5)
    for number in given_up:
        os.kill(number, signal.SIGCONT)
    assert ended(again).returncode == 0
    ended(process)
    cluster.equals(single)


def test_killed_while_the_parts_become_a_dataset(tmp_path: Path) -> None:
    """Kill at points all over the last step, from a folder in which all tasks are done."""
    small = parquet_source(tmp_path / "rows")
    single = Preparation(tmp_path / "single", small)
    single.place.mkdir()
    assert single.run().code == 0
    slurm = Slurm(tmp_path / "commands")
    done = Cluster(tmp_path / "done", small | slurm.variables)
    done.place.mkdir()
    run = done.run("--executor", "slurm", "--sbatch", "partition=cpu")
    assert run.returncode == 0, run
    slurm.run_jobs(done.slurm_script)

    def all_done(name: str) -> tuple[Cluster, Faults]:
        shutil.copytree(done.place, tmp_path / name)
        cluster = Cluster(tmp_path / name, small)
        return cluster, Faults(cluster.out)

    cluster, faults = all_done("unbroken")
    run = cluster.run(fault=(faults, None))
    assert run.returncode == 0, run
    points, _ = faults.points()
    moves = [point.number for point in points if (point.kind, point.what) == ("rename", "shard")]
    ends = [point.number for point in points if point.what == "manifest.json"]
    for at in (*moves[::3], *ends[-2:], len(points) - 3):
        cluster, faults = all_done(str(at))
        run = cluster.run(fault=(faults, Fault(at, signal.SIGKILL)))
        assert run.returncode == -signal.SIGKILL, (points[at - 1], run)
        run = cluster.run()
        assert run.returncode == 0, (points[at - 1], run)
        cluster.equals(single.out)
