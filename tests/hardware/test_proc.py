"""/proc and control groups: trees in a temporary folder, and those of this machine."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from app.hardware.proc import (
    available_memory_bytes,
    child_processes,
    cpu_model,
    cpu_quota,
    peak_resident_bytes,
    process_seconds,
)

MEMINFO = {"proc/meminfo": "MemTotal:  16384 kB\nMemAvailable:  8192 kB\nHugePages_Total: 0\n"}
V1 = {
    "proc/self/cgroup": (
        "11:memory:/docker/job\n4:cpu,cpuacct:/docker/job\n1:name=systemd:/docker/job\n"
    )
}
V2 = {"proc/self/cgroup": "0::/slice/job\n"}


def tree(root: Path, *trees: dict[str, str]) -> Path:
    """Write files by their paths below root."""
    for files in trees:
        for name, text in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return root


def v2_memory(folder: str, limit: str, usage: int, cached: int = 0) -> dict[str, str]:
    place = f"sys/fs/cgroup{folder}"
    return {
        f"{place}/memory.max": f"{limit}\n",
        f"{place}/memory.current": f"{usage}\n",
        f"{place}/memory.stat": f"anon 100\ninactive_file {cached}\n",
    }


def v1_memory(folder: str, limit: int, usage: int) -> dict[str, str]:
    place = f"sys/fs/cgroup/memory{folder}"
    return {
        f"{place}/memory.limit_in_bytes": f"{limit}\n",
        f"{place}/memory.usage_in_bytes": f"{usage}\n",
    }


def v1_cpu(quota: int) -> dict[str, str]:
    place = "sys/fs/cgroup/cpu,cpuacct/docker/job"
    return {f"{place}/cpu.cfs_quota_us": f"{quota}\n", f"{place}/cpu.cfs_period_us": "100000\n"}


def test_without_a_limit_the_machines_memory_is_available(tmp_path: Path) -> None:
    assert available_memory_bytes(tree(tmp_path, MEMINFO)) == 8192 << 10


@pytest.mark.parametrize(
    ("files", "available"),
    (
        ((V2, v2_memory("/slice/job", "5000", 4000, 600)), 1600),
        ((V2, v2_memory("/slice/job", "max", 4000)), 8192 << 10),
        ((V2, v2_memory("/slice/job", "5000", 6000)), 0),
        # The group above has less left.
        (
            (V2, v2_memory("/slice/job", "5000", 1000), v2_memory("/slice", "9000", 8000)),
            1000,
        ),
        # A container sees its own group at the top.
        ((V2, v2_memory("", "5000", 2000)), 3000),
        ((V1, v1_memory("/docker/job", 7000, 4000)), 3000),
        ((V1, v1_memory("", 7000, 5000)), 2000),
        ((V1, v1_memory("/docker/job", 2**63 - 4096, 4000)), 8192 << 10),
        ((V1, v1_memory("/docker/other", 7000, 5000)), 8192 << 10),
    ),
    ids=(
        *("v2", "v2 without a limit", "v2 above its limit", "v2 outer group", "v2 container"),
        *("v1", "v1 container", "v1 without a limit", "v1 other group"),
    ),
)
def test_control_groups_limit_memory(
    tmp_path: Path, files: tuple[dict[str, str], ...], available: int
) -> None:
    assert available_memory_bytes(tree(tmp_path, MEMINFO, *files)) == available


@pytest.mark.parametrize(
    ("files", "cores"),
    (
        ((V2, {"sys/fs/cgroup/slice/job/cpu.max": "200000 100000\n"}), 2.0),
        ((V2, {"sys/fs/cgroup/slice/job/cpu.max": "max 100000\n"}), None),
        ((V2, {"sys/fs/cgroup/cpu.max": "50000 100000\n"}), 0.5),
        (
            (
                V2,
                {"sys/fs/cgroup/slice/job/cpu.max": "400000 100000\n"},
                {"sys/fs/cgroup/slice/cpu.max": "150000 100000\n"},
            ),
            1.5,
        ),
        ((V1, v1_cpu(250_000)), 2.5),
        ((V1, v1_cpu(-1)), None),
        ((), None),
    ),
    ids=("v2", "v2 without a limit", "v2 container", "v2 outer group", "v1", "v1 none", "nothing"),
)
def test_control_groups_limit_the_cores(
    tmp_path: Path, files: tuple[dict[str, str], ...], cores: float | None
) -> None:
    assert cpu_quota(tree(tmp_path, *files)) == cores


def test_a_process_is_found_by_its_parent_whatever_its_name(tmp_path: Path) -> None:
    stats = {
        "proc/10/stat": "10 (python) S 1 10 10 0\n",
        "proc/11/stat": "11 (a) S 99 (x) S 10 11 11 0\n",
        "proc/12/stat": "12 (cat) R 11 12 12 0\n",
        "proc/13/stat": "",
    }
    root = tree(tmp_path, stats)
    (root / "proc/14").mkdir()
    (root / "proc/14/stat").write_bytes(b"14 (\xff) S 10 14 14 0\n")
    assert sorted(child_processes(10, root)) == [11, 14]
    assert child_processes(12, root) == []


def test_values_of_this_process_are_read(tmp_path: Path) -> None:
    files = {
        "proc/self/status": "Name:\tpython\nVmHWM:\t  1024 kB\n",
        "proc/cpuinfo": "processor\t: 0\nmodel name\t: A CPU @ 2 GHz\n\nmodel name\t: other\n",
    }
    root = tree(tmp_path, files)
    assert peak_resident_bytes(root) == 1024 << 10
    assert cpu_model(root) == "A CPU @ 2 GHz"


def test_a_system_without_proc_has_no_limits(tmp_path: Path) -> None:
    assert available_memory_bytes(tmp_path) == sys.maxsize
    assert peak_resident_bytes(tmp_path) == 0
    assert process_seconds(tmp_path) == 0
    assert cpu_model(tmp_path) == os.uname().machine


def test_this_machine_answers() -> None:
    now = process_seconds()
    assert 0 < now <= process_seconds() < time.clock_gettime(time.CLOCK_BOOTTIME)
    assert 1_000_000 < peak_resident_bytes() < available_memory_bytes() < 1 << 50
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert process.pid in child_processes(os.getpid())
        process.communicate(b"\n")
    assert process.pid not in child_processes(os.getpid())
