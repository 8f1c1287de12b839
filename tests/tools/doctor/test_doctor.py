"""The whole table, on machines with real faults."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from app.tools.doctor.checks import Finding
from tests.mounts import Mounted, small_tmpfs
from tests.tools.doctor.conftest import copy_tree
from tests.tools.doctor.doctor_process import doctor, environment, start_doctor, table
from tests.train.processes import Process

pytestmark = pytest.mark.processes

CHECKS = (
    *("dataset", "run", "text", "vocabulary", "data folder", "disk space", "cpu"),
    *("driver", "device", "precision", "memory", "shared memory", "attention", "matmul"),
    *("copies", "compile", "duration", "cost"),
)
HOLD = """
import fcntl, sys
with open(sys.argv[1], "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    print("held", flush=True)
    sys.stdin.read()
"""


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_machine_without_faults_passes_and_no_file_changes(data_dir: Path) -> None:
    before = files(data_dir)
    result = doctor(data_dir)
    assert result.code == 0, result.output
    assert tuple(result.rows) == CHECKS
    assert result.error == ""
    assert "\x1b" not in result.output
    assert "continues at step 4 of 10" in result.rows["run"].found
    assert "for 6 steps of 256 tokens" in result.rows["duration"].found
    found = f"python -m app train --data-dir {data_dir} --run-name run --dataset-dir text"
    assert result.output.splitlines()[-1] == f"next: {found} with the same settings"
    assert before
    assert files(data_dir) == before


@pytest.mark.slow
def test_json_with_hashes_a_compiler_and_a_price(data_dir: Path) -> None:
    before = files(data_dir)
    variables = {"TRAIN_PRICE_PER_HOUR": "3600", "TRAIN_COMPILE": "true"}
    result = doctor(data_dir, "--json", "--verify", variables=variables)
    assert result.code == 0, result.output
    output = json.loads(result.output)
    rows = {finding.check: finding for finding in (Finding(**row) for row in output["findings"])}
    assert tuple(rows) == CHECKS
    assert "the SHA-256 of all 4 shards is right" in rows["dataset"].found
    assert rows["compile"].status == "pass"
    assert output["trial"]["compile_seconds"] > 0
    assert "measured now" in rows["duration"].found
    assert "compiled" in rows["duration"].found
    assert "not compiled" not in rows["duration"].found
    assert output["estimate"]["cost"] == pytest.approx(output["estimate"]["seconds"])
    assert output["estimate"]["disk_bytes"] > 0
    assert not before.items() - files(data_dir).items()
    # train reuses what doctor has compiled.
    code, output = Process(data_dir, TRAIN_COMPILE="true").end()
    assert code == 0, output
    assert "0 pieces of the model were compiled, 3 came from the cache" in output


def test_each_of_many_faults_has_its_row(data_dir: Path, tmp_path: Path) -> None:
    shard = data_dir / "text" / "stdlib_000000.bin"
    shard.write_bytes(shard.read_bytes()[:-100])
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, data_dir / "runs" / "run" / ".lock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        (tmp_path / "empty").mkdir()
        no_compiler = {"PATH": str(tmp_path / "empty"), "TRAIN_COMPILE": "true"}
        result = doctor(data_dir, variables={**no_compiler, "PREPARE_DATASET": "nowhere.txt"})
        other.communicate()
    result.assert_failed("dataset", f"shard {shard} has", "prepare the dataset again")
    result.assert_failed("run", "another process is working on", "wait for that train to end")
    result.assert_failed(
        "text", "there is no file or folder nowhere.txt", "correct PREPARE_DATASET"
    )
    result.assert_failed(
        "compile", "does not find a C++ compiler (apt-get install g++)", "TRAIN_COMPILE=false"
    )
    assert result.failures == {"dataset", "run", "text", "compile"}
    assert "not compiled" in result.rows["duration"].found
    assert result.output.splitlines()[-1].endswith(" 4 failed, 3 skipped")


@dataclass
class Folder:
    """A folder whose mode forbids writing, where mounting is not allowed."""

    place: Path

    def forbid(self, folder: Path) -> None:
        folder.chmod(0o500)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Mounted | Folder]:
    folder = tmp_path / "disk"
    folder.mkdir()
    for kind in ("-Urm", "-m"):
        with small_tmpfs(folder, "200k", kind) as mounted:
            if mounted.is_mounted():
                yield mounted
                return
    yield Folder(folder)


@pytest.mark.slow
def test_a_disk_that_is_too_small_and_then_full(disk: Mounted | Folder) -> None:
    if isinstance(disk, Folder):
        # A model that no disk has room for.
        many = dict.fromkeys(("TRAIN_KEEP_CHECKPOINTS", "TRAIN_MAX_STEPS"), "10000000")
        result = doctor(disk.place, variables=many | {"TRAIN_CHECKPOINT_EVERY": "1"})
        result.assert_failed("disk space", "the run needs", "set DATA_DIR to a larger disk")
        return
    result = doctor(disk.place)
    result.assert_failed("disk space", "the run needs", "set DATA_DIR to a larger disk")
    assert result.failures == {"disk space"}
    disk.fill()
    result = doctor(disk.place)
    result.assert_failed(
        "disk space", f"0 KB free in {disk.place}", "set DATA_DIR to a larger disk"
    )
    assert result.rows["duration"].status == "pass"


@pytest.mark.slow
def test_a_volume_that_cannot_be_written(disk: Mounted | Folder, text_shards: Path) -> None:
    data_dir = disk.place / "data"
    copy_tree(text_shards, data_dir / "text")
    disk.forbid(data_dir)
    reason = "Read-only file system" if isinstance(disk, Mounted) else "Permission denied"
    # As in the image.
    caches = {"TORCHINDUCTOR_CACHE_DIR": f"{data_dir}/cache/inductor"}
    caches["TRITON_CACHE_DIR"] = f"{data_dir}/cache/triton"
    result = doctor(data_dir, variables={"TRAIN_COMPILE": "true", **caches})
    result.assert_failed(
        "data folder", f"no permission to write or read {data_dir} ({reason})", "DATA_DIR"
    )
    assert result.rows["dataset"].status == "pass"
    assert result.failures <= {"data folder", "disk space"}, "one cause is reported once"
    assert result.rows["compile"].status == "skip"
    assert "not compiled" in result.rows["duration"].found


@pytest.mark.slow
def test_a_run_of_weeks_is_a_warning(tmp_path: Path) -> None:
    gpt2 = {"RECIPE": "gpt2-124M", "TRAIN_MICRO_BATCH_SIZE": "1", "MODEL_NUM_LAYERS": "1"}
    gpt2 |= {"TRAIN_TOKENS_PER_STEP": "524288", "TRAIN_MAX_STEPS": "1000000000"}
    result = doctor(tmp_path, variables=gpt2)
    assert result.rows["duration"].status == "warn"
    assert re.search(r"\d+ d \d+ h for 1,000,000,000 steps", result.rows["duration"].found)
    assert "docs/cloud.md" in result.rows["duration"].fix


@pytest.mark.slow
def test_a_signal_ends_doctor_and_its_processes(data_dir: Path, tmp_path: Path) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\nexec sleep 1000\n")
    compiler.chmod(0o755)
    hangs = {"CXX": str(compiler), "TRAIN_COMPILE": "true"}
    with start_doctor(data_dir, variables=hangs) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("pass  copies"):
                break
        assert len(processes_of(data_dir)) > 1
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=300)
    assert (process.returncode, error) == (128 + signal.SIGTERM, "stopped: by SIGTERM\n")
    assert processes_of(data_dir) == []


def processes_of(data_dir: Path) -> list[Path]:
    """Return the processes with this DATA_DIR; a zombie counts as ended."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            variables = (place / "environ").read_bytes()
            state = (place / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if f"DATA_DIR={data_dir}\0".encode() in variables and state != "Z":
            found.append(place)
    return found


@pytest.mark.slow
def test_only_a_terminal_without_no_color_gets_colors(tmp_path: Path) -> None:
    for variables, expected in (({}, True), ({"NO_COLOR": "1"}, False)):
        keyboard, terminal = os.openpty()
        fast = {"TRAIN_DEVICE": "cuda", "CUDA_VISIBLE_DEVICES": "", **variables}
        process = subprocess.Popen(
            [sys.executable, "-m", "app", "doctor"],
            env=environment(tmp_path, {**fast, "TERM": "xterm", "COLUMNS": "90"}),
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            stdout=terminal,
            stderr=subprocess.PIPE,
        )
        os.close(terminal)
        shown = b""
        while part := read_from(keyboard):
            shown += part
        os.close(keyboard)
        assert process.wait() == 1
        assert (b"\x1b[" in shown) == expected
        lines = shown.decode().replace("\r", "").splitlines()
        if not expected:
            assert max(map(len, lines)) <= 90
            assert table("\n".join(lines))["device"].status == "fail"


def read_from(keyboard: int) -> bytes:
    try:
        return os.read(keyboard, 65536)
    except OSError:
        # All ends of the terminal are closed.
        return b""
