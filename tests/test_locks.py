"""Locks between real processes, with flock and where the file system has none."""

import errno
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from signal import SIGKILL
from threading import Timer

import pytest

from app.errors import UserError
from app.locks import locked
from tests.faults import Fault, Faults
from tests.lacking import lacking

HOLD = """
import sys
from pathlib import Path
from app.cli.process import run_and_report
from app.locks import locked

def hold():
    with locked(Path(sys.argv[1]), "train"):
        print("locked", flush=True)
        sys.stdin.read()

sys.exit(run_and_report(hold))
"""
COUNT = """
import sys, time
from pathlib import Path
from app.locks import locked
folder = Path(sys.argv[1])
for _ in range(10):
    with locked(folder, "count", wait_seconds=60):
        count = int((folder / "count").read_text())
        # Without the lock, another process would come in between.
        time.sleep(0.001)
        (folder / "count").write_text(str(count + 1))
"""


class Processes:
    """Processes on one folder, whose file system lacks something."""

    def __init__(self, folder: Path, **calls: int) -> None:
        self.folder, self._started = folder, list[subprocess.Popen[str]]()
        self._environment = os.environ | (lacking(folder, **calls) if calls else {})

    def start(self, program: str = HOLD) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(self.folder)],
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._started.append(process)
        return process

    def holder(self) -> subprocess.Popen[str]:
        """Start a process that has the lock now."""
        process = self.start()
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n", process.communicate()
        return process

    def refused(self) -> str:
        """Start a process that does not get the lock; return its message."""
        process = self.start()
        out, err = process.communicate(timeout=300)
        assert (process.returncode, out) == (2, "")
        return err.removeprefix(warning(self.folder))

    def end(self) -> None:
        for process in self._started:
            process.kill()
            process.communicate()


def warning(folder: Path) -> str:
    return (
        f"warning: the file system of {folder} has no flock: the lock of a process that dies on "
        "another machine or in another container stays, until you delete the folder that the error "
        "names\n"
    )


@pytest.fixture(params=(None, errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL))
def processes(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Processes]:
    """Processes where flock works, or fails in one of these ways."""
    calls = {} if request.param is None else {"lock": request.param}
    processes = Processes(tmp_path, **calls)
    yield processes
    processes.end()


@pytest.fixture
def without_flock(tmp_path: Path) -> Iterator[Processes]:
    processes = Processes(tmp_path, lock=errno.ENOSYS)
    yield processes
    processes.end()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_second_process_is_refused_until_the_first_has_ended(processes: Processes) -> None:
    folder, first = processes.folder, processes.holder()
    message = processes.refused()
    assert message.startswith(f"error: another process is working on {folder}")
    assert "fix: wait for that train to end, or stop it" in message
    first.communicate("", timeout=300)
    assert names(folder) == [".lock"]
    assert processes.holder().communicate("", timeout=300)[0] == ""


def test_a_killed_process_leaves_no_lock(processes: Processes) -> None:
    for _ in range(2):
        holder = processes.holder()
        holder.send_signal(SIGKILL)
        holder.wait(timeout=300)
    processes.holder().communicate("", timeout=300)
    assert names(processes.folder) == [".lock"]


def test_a_kill_at_any_moment_of_the_lock_blocks_nobody(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    faults, lacks = Faults(folder), lacking(folder, lock=errno.ENOSYS)

    def end(fault: Fault | None = None) -> int:
        environment = os.environ | lacks | faults.environment(fault)
        environment["LD_PRELOAD"] += f":{lacks['LD_PRELOAD']}"
        holder = [sys.executable, "-c", HOLD, str(folder)]
        return subprocess.run(holder, env=environment, input=b"", capture_output=True).returncode

    assert end() == 0
    points, _ = faults.points()
    assert {"create", "mkdir", "rename", "unlink"} <= {point.kind for point in points}
    for point in points:
        assert end(Fault(point.number, SIGKILL)) == -SIGKILL
        assert end() == 0, point
        assert not (folder / ".locked").exists(), point


def test_only_one_of_many_has_the_lock(without_flock: Processes) -> None:
    folder = without_flock.folder
    killed = without_flock.holder()
    killed.kill()
    killed.wait(timeout=300)
    (folder / "count").write_text("0")
    for counter in [without_flock.start(COUNT) for _ in range(6)]:
        _, err = counter.communicate(timeout=300)
        assert counter.returncode == 0, err
    assert (folder / "count").read_text() == "60"
    assert names(folder) == [".lock", "count"]


def test_without_flock_the_message_names_the_process(without_flock: Processes) -> None:
    folder, holder = without_flock.folder, without_flock.holder()
    owner = f"process {holder.pid} on {platform.node()}, which began"
    assert re.fullmatch(
        rf"error: another process is working on {folder}: {re.escape(owner)} [\d.]+ m?s ago\n"
        rf"  fix: wait for that train to end, or stop it; if it has died, delete the folder "
        rf"{folder}/\.locked\n",
        without_flock.refused(),
    )


def test_without_flock_the_lock_of_another_machine_stays_until_it_is_deleted(
    without_flock: Processes,
) -> None:
    folder = without_flock.folder
    claimed = folder / ".locked" / "5_77_other-boot_worker-3"
    claimed.parent.mkdir()
    claimed.touch()
    hours_ago = claimed.stat().st_mtime - 3 * 3600
    os.utime(claimed, (hours_ago, hours_ago))
    message = without_flock.refused()
    assert ": process 5 on worker-3, which began 3 h 0 min ago\n" in message
    assert message.endswith(f"if it has died, delete the folder {folder}/.locked\n")
    assert claimed.exists()
    claimed.unlink()
    without_flock.holder()


def test_locked_folder_is_refused_until_it_is_released(tmp_path: Path) -> None:
    with (
        locked(tmp_path, "train"),
        pytest.raises(UserError, match="another process is working on"),
        locked(tmp_path, "train"),
    ):
        pass
    with locked(tmp_path, "train"):
        pass


def test_a_lock_that_is_held_for_an_instant_refuses_nobody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ExitStack() as holder:
        holder.enter_context(locked(tmp_path, "doctor"))
        Timer(0.02, holder.pop_all().close).start()
        with locked(tmp_path, "train"):
            pass
    assert capsys.readouterr().err == ""


def test_lock_is_waited_for_until_the_time_is_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ExitStack() as holder:
        holder.enter_context(locked(tmp_path, "train"))
        with (
            pytest.raises(UserError, match="another process is working on"),
            locked(tmp_path, "train", wait_seconds=0.01),
        ):
            pass
        Timer(0.05, holder.pop_all().close).start()
        with locked(tmp_path, "train", wait_seconds=60):
            pass
    assert capsys.readouterr().err.count("waiting for another train to release") == 2
