"""The machine around the device: its cores, and the disk below DATA_DIR."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from app.settings.train import ModelSettings
from app.tools.doctor.case import CHECKPOINT_BYTES, Case, existing
from app.tools.doctor.finding import Finding, counted, failure, gigabytes

_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_BUSY_SHARE = 0.5
_BYTES_OF_A_TOKEN = 2
# Compiled code, what the hub's library keeps, logs and events of a run.
_CACHE_BYTES = 300_000_000
_ROOM_TO_SPARE = 1.2


def check_cpu(_case: Case) -> Iterator[Finding]:
    """Check that the cores this process may use are granted to it, and free."""
    cores = len(os.sched_getaffinity(0))
    quota = cpu_quota(_CGROUP_QUOTA.read_text() if _CGROUP_QUOTA.exists() else "")
    threads = os.environ.get("OMP_NUM_THREADS", "")
    used = int(threads) if threads.isdigit() else cores
    busy = os.getloadavg()[0]
    said = counted(cores, "core") + (f", of which OMP_NUM_THREADS uses {used}" if threads else "")
    if quota is not None and quota < min(used, cores):
        said += f"; but this container gets the time of {quota:g} only, and threads wait in turn"
        fix = f"set OMP_NUM_THREADS={max(1, round(quota))}, or lift the limit (cpus)"
        yield Finding("cpu", "warn", said, fix)
    elif busy > _BUSY_SHARE * cores:
        said += f", which {busy:.1f} other threads want: what is measured now is too slow"
        yield Finding("cpu", "warn", said, "run doctor again when that has ended")
    else:
        yield Finding("cpu", "pass", said)


def cpu_quota(text: str) -> float | None:
    """Cores' worth of time that a control group's cpu.max (version 2) grants; None for all."""
    words = text.split()
    if len(words) != 2 or not all(word.isdigit() for word in words):
        return None
    return int(words[0]) / int(words[1])


def check_folders(case: Case) -> Iterator[Finding]:
    """Check that this user can write wherever prepare and train will."""
    settings = case.settings
    data_dir = settings.general.data_dir
    wanted = [data_dir, data_dir / "cache", settings.run_dir, settings.run_dir / "checkpoints"]
    if not case.fingerprint:
        wanted.append(settings.prepare_dir)
    is_writable = True
    for folder in dict.fromkeys(existing(one) for one in wanted):
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            error.filename = str(folder)
            yield failure("data folder", error)
            is_writable = False
    if is_writable:
        yield Finding("data folder", "pass", f"{data_dir} can be written by user {os.getuid()}")


def check_space(case: Case) -> Iterator[Finding]:
    """Check that shards, caches and checkpoints (kept, best, being written) fit."""
    settings, data_dir = case.settings, case.settings.general.data_dir
    place, shards = existing(data_dir), _shard_bytes(case)
    count = settings.train.keep_checkpoints + 2
    size = CHECKPOINT_BYTES * count_parameters(settings.model)
    expected = {
        settings.train_dataset_dir: shards or 0,
        settings.run_dir: count * size,
        data_dir / "cache": _CACHE_BYTES,
    }
    more = sum(max(0, needed - _size(folder)) for folder, needed in expected.items())
    case.disk_bytes, free = more, shutil.disk_usage(place).free
    of_shards = "shards of unknown size" if shards is None else f"{gigabytes(shards)} shards"
    said = (
        f"{gigabytes(free)} free in {place}; the run needs {gigabytes(more)} more "
        f"({of_shards}, {count} checkpoints of {gigabytes(size)}, caches)"
    )
    if more > free:
        fix = "set DATA_DIR to a larger disk, or lower TRAIN_KEEP_CHECKPOINTS"
        yield Finding("disk space", "fail", said, f"free {gigabytes(more - free)}, {fix}")
    elif shards is None:
        fix = "set PREPARE_TOTAL_TOKENS to a number; each token takes 2 bytes"
        yield Finding("disk space", "warn", said, fix)
    elif _ROOM_TO_SPARE * more > free:
        yield Finding("disk space", "warn", said, "have more room to spare: set DATA_DIR")
    else:
        yield Finding("disk space", "pass", said)


def count_parameters(model: ModelSettings) -> int:
    """Return how many parameters a GPT has, without torch: weights and biases of its layers."""
    width = model.embd_size
    block = 12 * width**2 + 13 * width
    return (model.vocab_size + model.context_length + 2) * width + model.num_layers * block


def _shard_bytes(case: Case) -> int | None:
    """Return the size of the whole dataset; None if it is unknown until the text is read."""
    chosen = case.settings.prepare
    if case.fingerprint:
        return _size(case.settings.train_dataset_dir)
    if chosen.total_tokens != "all":
        return _BYTES_OF_A_TOKEN * (chosen.total_tokens + chosen.val_tokens)
    # FineWeb's samples say how many tokens they have.
    sample = re.fullmatch(r"sample-(\d+)BT", chosen.config or "")
    if sample is None:
        return None
    from app.prepare.sources import is_hub_id

    return _BYTES_OF_A_TOKEN * int(sample[1]) * 10**9 if is_hub_id(chosen.dataset) else None


def _size(folder: Path) -> int:
    if not folder.is_dir():
        return 0
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
