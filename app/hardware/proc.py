"""Memory, CPU time and processes, as Linux reports them in /proc and in control groups (cgroups).

Where a file is missing, as on other systems, there is no limit and nothing is known. `root` is the
folder that holds proc/ and sys/.
"""

import os
import platform
import re
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")
# The limit and the usage of a control group, in versions 2 and 1.
_CGROUP_MEMORY = (
    ("memory.max", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
)
# The quota and its period, likewise.
_CGROUP_CPU = (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us"))


def available_memory_bytes(root: Path = _ROOT) -> int:
    """Return the bytes of main memory that this process may still allocate.

    That is the least of what the machine has available, what this process's limits (ulimit) leave,
    and what its control groups leave.
    """
    available = _fields(root / "proc/meminfo").get("MemAvailable:")
    on_machine = sys.maxsize if available is None else available << 10
    return min([on_machine, *_left_by_ulimit(root), *_left_by_cgroups(root)])


def _left_by_ulimit(root: Path) -> Iterator[int]:
    usage = _fields(root / "proc/self/status")
    for kind, field in ((resource.RLIMIT_AS, "VmSize:"), (resource.RLIMIT_DATA, "VmData:")):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY:
            yield max(0, limit - (usage.get(field, 0) << 10))


def _left_by_cgroups(root: Path) -> Iterator[int]:
    for folder in _cgroups("memory", root):
        for files in _CGROUP_MEMORY:
            limit, usage = (_read(folder / file).strip() for file in files)
            if limit.isdigit() and usage.isdigit():
                # The kernel drops this part of the page cache before it refuses memory.
                cached = _fields(folder / "memory.stat").get("inactive_file", 0)
                yield max(0, int(limit) - int(usage) + cached)


def cpu_quota(root: Path = _ROOT) -> float | None:
    """Return how many cores' worth of time the control groups grant; None for no limit.

    Format: Linux, Documentation/admin-guide/cgroup-v2.rst and scheduler/sched-bwc.rst.
    """
    quotas = []
    for folder in _cgroups("cpu", root):
        for files in _CGROUP_CPU:
            words = " ".join(_read(folder / file) for file in files).split()
            if len(words) == 2 and all(word.isdigit() for word in words):
                quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def _cgroups(controller: str, root: Path) -> Iterator[Path]:
    """Yield the folder of this process's control group, and of each group that contains it."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, name = line.split(":", 2)
        # Version 2 has one hierarchy, without names of controllers.
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / controllers
        group = top / name.strip("/")
        # A container may know the host's name of the group, but see the group itself at the top.
        yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(top))


def usable_cores() -> int:
    """Return the number of cores on which this process may run."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_resident_bytes(root: Path = _ROOT) -> int:
    """Return the most resident memory that this process has had; 0 if unknown."""
    # getrusage starts with the figure of the process that started this one.
    return _fields(root / "proc/self/status").get("VmHWM:", 0) << 10


def cpu_model(root: Path = _ROOT) -> str:
    """Return the CPU's name as its maker gives it; the architecture if that is unknown."""
    model = re.search(r"^model name\s*: (.+)$", _read(root / "proc/cpuinfo"), re.MULTILINE)
    return model[1].strip() if model else platform.machine()


def process_seconds(root: Path = _ROOT) -> float:
    """Return the seconds since this process began; 0 if unknown."""
    fields = _stat_fields(root / "proc/self/stat")
    if not fields:
        return 0.0
    # Field 22 of proc_pid_stat(5), starttime; the first here is field 3.
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME")) - started  # noqa: B009 (mypy knows none on a Mac)


def child_processes(pid: int, root: Path = _ROOT) -> list[int]:
    """Return the ids of the processes whose parent is process `pid`."""
    stats = (root / "proc").glob("[0-9]*/stat")
    return [int(stat.parent.name) for stat in stats if _stat_fields(stat)[1:2] == [str(pid)]]


def _stat_fields(path: Path) -> list[str]:
    """Return the fields after the command's name, which may itself hold spaces and parentheses."""
    return _read(path).rpartition(")")[2].split()


def _fields(path: Path) -> dict[str, int]:
    """Return name -> number of a file's lines, each with a name, a number and perhaps a unit."""
    lines = [line.split() for line in _read(path).splitlines()]
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""
