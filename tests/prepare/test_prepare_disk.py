"""A disk that fills up, and one that can no longer be written, under a real process."""

import errno
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from app.errors import ExitCode
from tests.faults import Fault
from tests.mounts import Mounted, small_tmpfs
from tests.prepare.prepare_process import (
    Preparation,
    Unbroken,
    contents,
    parquet_source,
    unbroken,
)

BEFORE_THE_MANIFEST = 3


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    source = parquet_source(tmp_path_factory.mktemp("source") / "rows")
    return unbroken(tmp_path_factory.mktemp("unbroken"), source)


@dataclass
class Folder:
    """A disk without mounting: a full disk's errors are injected; permissions are a mode."""

    place: Path
    fault: Fault | None
    forbidden = "Permission denied"

    def fill(self) -> None:
        self.fault = Fault(BEFORE_THE_MANIFEST, fails=errno.ENOSPC)

    def make_room(self) -> None:
        self.fault = None

    def forbid(self, folder: Path) -> None:
        folder.chmod(0o500)

    def allow(self, folder: Path) -> None:
        folder.chmod(0o700)


Disk = Folder | Mounted


@pytest.fixture(params=("tmpfs", "folder"))
def disk(request: pytest.FixtureRequest, clean: Unbroken, tmp_path: Path) -> Iterator[Disk]:
    """Provide a small disk; or a folder where mounting is forbidden, as in a container."""
    folder = tmp_path / "disk"
    folder.mkdir()
    for kind in ("-Urm", "-m") if request.param == "tmpfs" else ():
        with small_tmpfs(folder, "40k", kind) as mounted:
            if mounted.is_mounted():
                yield mounted
                return
    yield Folder(folder, Fault(number(clean, "torn", "shard"), fails=errno.ENOSPC))


def number(clean: Unbroken, kind: str, what: str) -> int:
    """Return the number of a point between the first shard and the last."""
    numbers = [point.number for point in clean.points if (point.kind, point.what) == (kind, what)]
    return numbers[len(numbers) // 2]


def assert_reported(error: str, problem: str, place: Path, fix: str) -> None:
    message, _, advice = error.removeprefix("error: ").partition("\n  fix: ")
    assert problem in message
    assert str(place) in message
    assert fix in advice
    assert error.count("\n") == 2


def nothing_is_lost(preparation: Preparation, clean: Unbroken) -> None:
    """Check that the files are complete shards, which the manifest lists."""
    committed = preparation.committed()
    files = contents(preparation.out)
    assert files.keys() - {"manifest.json", "sources.jsonl", ".lock"} == committed.keys()
    assert all(files[name] == clean.contents[name] for name in committed)


def test_run_on_a_full_disk_keeps_its_shards_and_continues_when_there_is_space(
    clean: Unbroken, disk: Disk
) -> None:
    preparation = clean.again(disk.place)
    ended = preparation.run(workers=2, fault=disk.fault)
    assert ended.code == ExitCode.EXHAUSTED
    assert_reported(ended.error, "the disk is full", preparation.out, "free space")
    assert preparation.committed()
    nothing_is_lost(preparation, clean)
    disk.make_room()
    clean.is_reached_by(preparation)


def test_second_run_on_a_full_disk_loses_nothing(clean: Unbroken, disk: Disk) -> None:
    """The second run has no space even for the manifest's next version."""
    preparation = clean.again(disk.place)
    assert preparation.run(fault=disk.fault).code == ExitCode.EXHAUSTED
    committed = preparation.committed()
    assert committed
    disk.fill()
    assert preparation.run(fault=disk.fault).code == ExitCode.EXHAUSTED
    assert preparation.committed() == committed
    nothing_is_lost(preparation, clean)
    disk.make_room()
    clean.is_reached_by(preparation)


def test_lost_permission_is_reported_and_the_run_continues_when_it_is_back(
    clean: Unbroken, disk: Disk
) -> None:
    disk.make_room()
    preparation = clean.again(disk.place)
    with preparation.stopped(number(clean, "create", "shard")) as process:
        disk.forbid(preparation.out)
        process.send_signal(signal.SIGCONT)
        ended = preparation.end(process)
    assert ended.code == ExitCode.USER
    assert_reported(ended.error, disk.forbidden, preparation.out, "DATA_DIR")
    again = preparation.run()
    assert again.code == ExitCode.USER
    assert_reported(again.error, disk.forbidden, preparation.out, "DATA_DIR")
    assert preparation.committed()
    nothing_is_lost(preparation, clean)
    disk.allow(preparation.out)
    clean.is_reached_by(preparation)


@pytest.mark.parametrize(
    ("kind", "what", "error"),
    (
        ("fsync", "shard", errno.EDQUOT),
        ("rename", "manifest.json", errno.ENOSPC),
    ),
)
def test_disk_that_is_full_from_a_point_on(
    clean: Unbroken, tmp_path: Path, kind: str, what: str, error: int
) -> None:
    """`make soak` tests all points."""
    preparation = clean.again(tmp_path)
    ended = preparation.run(fault=Fault(number(clean, kind, what), fails=error))
    assert ended.code == ExitCode.EXHAUSTED
    assert_reported(ended.error, "the disk is full", preparation.out, "free space")
    assert not list(preparation.out.glob("*.partial"))
    clean.is_reached_by(preparation)
