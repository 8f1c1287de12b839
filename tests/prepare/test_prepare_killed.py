"""Real processes that are killed while they prepare; the next one completes the same dataset."""

import shutil
import signal
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from app.errors import ExitCode
from tests.faults import Fault
from tests.prepare.prepare_process import (
    Preparation,
    Unbroken,
    contents,
    parquet_source,
    unbroken,
)

CALLS = ("create", "write", "torn", "fsync", "rename", "unlink")
KINDS = (
    ("mkdir", "folder"),
    ("create", "lock"),
    ("fsync", "folder"),
    *((call, "sources.jsonl") for call in ("create", "write", "torn", "fsync")),
    *((call, what) for what in ("manifest.json", "shard") for call in CALLS),
)
# A kill before a file is created, or after it has its name, finds the same as one at these calls.
ONCE = [kind for kind in KINDS[2:] if kind[0] not in ("create", "unlink")]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("source") / "rows"


@pytest.fixture(scope="module")
def rows(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    return unbroken(tmp_path_factory.mktemp("unbroken"), parquet_source(source))


def middle(clean: Unbroken, kind: str, what: str) -> int:
    numbers = [point.number for point in clean.points if (point.kind, point.what) == (kind, what)]
    return numbers[len(numbers) // 2]


def killed(preparation: Preparation, at: int, workers: int = 1) -> None:
    assert preparation.run(workers, Fault(at, signal.SIGKILL)).code == -signal.SIGKILL


def test_every_write_and_every_rename_is_a_point(rows: Unbroken) -> None:
    """Otherwise these tests would miss moments."""
    assert {(point.kind, point.what) for point in rows.points} == set(KINDS)
    written = Counter[str]()
    for point in rows.points:
        if point.kind == "write" and point.what == "shard":
            written[point.file.removesuffix(".partial")] += point.bytes
    sizes = {name: size for name, (size, _) in rows.contents.items() if name.endswith(".bin")}
    # The size of the last one is known only at its end: its header is written twice.
    last = max(name for name in sizes if "val" not in name)
    assert written - Counter({last: 1024}) == sizes
    assert sizes.keys() == {
        point.file for point in rows.points if (point.kind, point.what) == ("rename", "shard")
    }


@pytest.mark.parametrize(
    ("kind", "what"),
    tuple(
        pytest.param(*kind, marks=() if kind[0] in ("torn", "rename") else pytest.mark.slow)
        for kind in ONCE
    ),
)
def test_killed_at_each_kind_of_point_equals_unbroken(
    rows: Unbroken, tmp_path: Path, kind: str, what: str
) -> None:
    """At the first, a middle or the last one; `make soak` kills at all of them."""
    points = [point for point in rows.points if (point.kind, point.what) == (kind, what)]
    point = points[(-1, len(points) // 2, 0)[ONCE.index((kind, what)) % 3]]
    preparation = rows.again(tmp_path)
    ended = preparation.run(fault=Fault(point.number, signal.SIGKILL))
    assert ended.code == -signal.SIGKILL
    assert ended.points == rows.points[: point.number]
    rows.is_reached_by(preparation)


def test_killed_again_while_continuing_with_other_workers_equals_unbroken(
    rows: Unbroken, tmp_path: Path
) -> None:
    preparation = rows.again(tmp_path)
    killed(preparation, middle(rows, "torn", "shard"), workers=2)
    held = preparation.committed()
    for workers, at in ((4, 1), (1, len(rows.points) // 4)):
        killed(preparation, at, workers)
        assert held.items() <= preparation.committed().items()
    rows.is_reached_by(preparation, workers=2)


def test_tokenized_text_is_not_read_again(source: Path, rows: Unbroken, tmp_path: Path) -> None:
    """The first file's rows are wiped out before the run continues."""
    clean_copy = tmp_path / "rows"
    clean_copy.mkdir()
    for path in source.iterdir():
        (clean_copy / path.name).write_bytes(path.read_bytes())
    settings = {
        **rows.settings,
        "PREPARE_DATASET": str(clean_copy),
        "PREPARE_SHUFFLE_FILES": "false",
    }
    for folder in ("unbroken", "killed"):
        (tmp_path / folder).mkdir()
    clean = unbroken(tmp_path / "unbroken", settings)
    preparation = clean.again(tmp_path / "killed")
    killed(preparation, middle(clean, "create", "shard"))
    wipe(clean_copy / "0.parquet")
    clean.is_reached_by(preparation)


def test_renamed_source_continues_with_the_first_name(
    source: Path, rows: Unbroken, tmp_path: Path
) -> None:
    preparation = rows.again(tmp_path)
    killed(preparation, middle(rows, "create", "shard"))
    foreign = preparation.out / "mine_000000.bin"
    foreign.write_bytes(b"mine")
    shutil.copytree(source, tmp_path / "moved")
    moved = {**rows.settings, "PREPARE_DATASET": str(tmp_path / "moved")}
    ended = Preparation(tmp_path, moved).run()
    assert ended.code == 0, ended
    assert foreign.read_bytes() == b"mine"
    foreign.unlink()
    assert contents(preparation.out) == rows.contents


def test_folder_that_cannot_be_read_is_reported(
    source: Path, rows: Unbroken, tmp_path: Path
) -> None:
    shutil.copytree(source, tmp_path / "text")
    (tmp_path / "text" / "closed").mkdir(mode=0)
    settings = {**rows.settings, "PREPARE_DATASET": str(tmp_path / "text")}
    ended = Preparation(tmp_path, settings).run()
    assert ended.code == ExitCode.USER
    assert f"the folder {tmp_path}/text/closed cannot be read: Permission denied" in ended.error


def wipe(path: Path) -> None:
    """Overwrite all row groups of a parquet file, but not its footer."""
    groups = pq.ParquetFile(path).metadata
    columns = [
        groups.row_group(group).column(column)
        for group in range(groups.num_row_groups)
        for column in range(groups.num_columns)
    ]
    content = bytearray(path.read_bytes())
    for column in columns:
        start = column.dictionary_page_offset or column.data_page_offset
        content[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(content)


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT), ids=("SIGTERM", "SIGINT"))
def test_stopped_by_a_signal_equals_unbroken(
    rows: Unbroken, tmp_path: Path, number: signal.Signals
) -> None:
    preparation = rows.again(tmp_path)
    ended = preparation.run(fault=Fault(middle(rows, "write", "shard"), number))
    assert ended.code == 128 + number
    assert ended.error.startswith("stopped: ")
    assert "Traceback" not in ended.error
    assert not list(preparation.out.glob("*.partial"))
    assert preparation.committed()
    rows.is_reached_by(preparation)


def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(
    rows: Unbroken, tmp_path: Path
) -> None:
    preparation = rows.again(tmp_path)
    with preparation.stopped(middle(rows, "fsync", "shard")):
        before = contents(preparation.out)
        second = rows.again(tmp_path).run()
        assert second.code == ExitCode.USER
        assert f"another process is working on {preparation.out}" in second.error
        assert "wait for that prepare to end, or stop it" in second.error
        assert contents(preparation.out) == before
    rows.is_reached_by(preparation)
