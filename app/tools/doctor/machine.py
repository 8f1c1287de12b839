"""The machine around the device: processors and clock."""

import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import app
from app.tools.doctor.finding import Finding

_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_DAY_SECONDS = 86400
_BUSY_SHARE = 0.5
# Certificates and signed addresses of the hub bear a few minutes.
CLOCK_TOLERANCE_SECONDS = 300


def check_cpu() -> Iterator[Finding]:
    """How many cores this process may use, and whether it knows."""
    cores = len(os.sched_getaffinity(0))
    quota = cpu_quota(_CGROUP_QUOTA.read_text() if _CGROUP_QUOTA.exists() else "")
    threads = os.environ.get("OMP_NUM_THREADS", "")
    used = int(threads) if threads.isdigit() else cores
    said = f"{cores} cores" + (f", of which OMP_NUM_THREADS uses {used}" if threads else "")
    if quota is not None and quota < min(used, cores):
        yield Finding(
            "cpu",
            "warn",
            f"{said}; but this container gets the time of {quota:g} only, and threads wait in turn",
            f"set OMP_NUM_THREADS={max(1, round(quota))}, or lift the limit (cpus)",
        )
    elif (busy := os.getloadavg()[0]) > _BUSY_SHARE * cores:
        yield Finding(
            "cpu",
            "warn",
            f"{said}, which {busy:.1f} other threads want: what is measured now is too slow",
            "run doctor again when that has ended",
        )
    elif cores == 1:
        yield Finding(
            "cpu", "warn", said, "have 2 or more: loading and saving run beside the training"
        )
    else:
        yield Finding("cpu", "pass", said)


def cpu_quota(text: str) -> float | None:
    """Cores' worth of time that a control group's cpu.max (version 2) grants; None for all."""
    words = text.split()
    if len(words) != 2 or not all(word.isdigit() for word in words):
        return None
    return int(words[0]) / int(words[1])


def check_clock() -> Iterator[Finding]:
    """Whether the clock may be right, without a network: time has passed since this was written."""
    made = Path(app.__file__).stat().st_mtime
    now = datetime.fromtimestamp(time.time(), UTC)
    said = f"{now:%Y-%m-%d %H:%M} UTC"
    if now.timestamp() < made - _DAY_SECONDS:
        yield Finding(
            "clock",
            "warn",
            f"{said}, but this program is newer than that",
            "set the clock (timedatectl set-ntp true): connections and logs need it",
        )
    else:
        yield Finding("clock", "pass", said)
