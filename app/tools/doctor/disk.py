"""The disk below DATA_DIR: whose it is, how large, how fast, and whether it knows locks."""

import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from app.data.documents import is_hub_id
from app.tools.doctor.case import Case, existing
from app.tools.doctor.finding import Finding, failure, gigabytes

_BYTES_OF_A_TOKEN = 2
# A weight and at most two moments of it, in float32.
_BYTES_OF_A_PARAMETER = 12
# Compiled code, what the hub's library keeps, logs and events of a run.
_CACHE_BYTES = 300_000_000
_ROOM_TO_SPARE = 1.2
_SPEED_TEST_BYTES = 32 << 20
_LONGEST_SAVE_SECONDS = 60.0


@dataclass(frozen=True)
class DiskNeed:
    """Bytes that a run comes to have on the disk, and what is still to come.

    Attributes:
        shards: None if nobody knows before the text is read
        checkpoint: one of them
        checkpoints: all that there are while one more is written
        more: what is not there yet, of shards, checkpoints and caches
    """

    shards: int | None
    checkpoint: int
    checkpoints: int
    more: int


def disk_need(case: Case) -> DiskNeed:
    """Shards, checkpoints (those that are kept, the best, the one being written) and caches."""
    # Imported late: torch takes a second.
    import torch

    from app.model.gpt import GPT, GPTConfig

    settings = case.settings
    with torch.device("meta"):
        parameters = GPT(GPTConfig(**settings.model.model_dump())).num_parameters()
    checkpoint = _BYTES_OF_A_PARAMETER * parameters
    checkpoints = (settings.train.keep_checkpoints + 2) * checkpoint
    shards = _expected_shards(case)
    expected = {
        settings.train_dataset_dir: shards or 0,
        settings.run_dir: checkpoints,
        settings.general.data_dir / "cache": _CACHE_BYTES,
    }
    more = sum(max(0, size - _size(folder)) for folder, size in expected.items())
    return DiskNeed(shards, checkpoint, checkpoints, more)


def _expected_shards(case: Case) -> int | None:
    prepared = case.settings.prepare
    if case.is_prepared:
        return _size(case.settings.train_dataset_dir)
    if prepared.total_tokens != "all":
        return _BYTES_OF_A_TOKEN * (prepared.total_tokens + prepared.val_tokens)
    # FineWeb's samples say how many tokens they have.
    sample = re.fullmatch(r"sample-(\d+)BT", prepared.config or "")
    if is_hub_id(prepared.dataset) and sample:
        return _BYTES_OF_A_TOKEN * int(sample[1]) * 10**9
    return None


def _size(folder: Path) -> int:
    if not folder.is_dir():
        return 0
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def check_folders(case: Case) -> Iterator[Finding]:
    """Whether this user can write wherever prepare and train will."""
    settings = case.settings
    data_dir = settings.general.data_dir
    wanted = [data_dir, data_dir / "cache", settings.run_dir, settings.run_dir / "checkpoints"]
    if not case.is_prepared:
        wanted.append(settings.prepare_dir)
    for folder in dict.fromkeys(existing(one) for one in wanted):
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            error.filename, case.can_write = str(folder), False
            yield failure("data folder", error)
    if case.can_write:
        yield Finding("data folder", "pass", f"{data_dir} can be written by user {os.getuid()}")


def check_locks(case: Case) -> Iterator[Finding]:
    """Whether a lock keeps a second process out: network file systems may only seem to."""
    place = existing(case.settings.general.data_dir)
    if not case.can_write:
        yield Finding("file locks", "skip", "not tried: no file can be written")
        return
    with tempfile.NamedTemporaryFile(dir=place) as first, Path(first.name).open() as second:
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield Finding("file locks", "pass", f"a second process is kept out of {place}")
            return
    yield Finding(
        "file locks",
        "fail",
        f"the file system of {place} grants the same lock twice",
        "set DATA_DIR to a local disk: nothing would keep a second train out of a run",
    )


def check_speed(case: Case) -> Iterator[Finding]:
    """How fast the disk takes what must survive a loss of power."""
    place = existing(case.settings.general.data_dir)
    if not case.can_write:
        yield Finding("disk speed", "skip", "not tried: no file can be written")
        return
    size = min(_SPEED_TEST_BYTES, shutil.disk_usage(place).free // 2)
    with tempfile.TemporaryFile(dir=place, buffering=0) as file:
        started = time.perf_counter()
        file.write(os.urandom(1 << 20) * max(1, size >> 20))
        os.fsync(file.fileno())
        rate = file.tell() / (time.perf_counter() - started)
    checkpoint = disk_need(case).checkpoint
    seconds = checkpoint / rate
    said = (
        f"{gigabytes(rate)}/s with fsync: a checkpoint of {gigabytes(checkpoint)} "
        f"takes {seconds:.2g} s"
    )
    if seconds > _LONGEST_SAVE_SECONDS:
        yield Finding(
            "disk speed",
            "warn",
            said,
            "set DATA_DIR to a faster disk; after SIGTERM a save must end before the machine does",
        )
    else:
        yield Finding("disk speed", "pass", said)


def check_space(case: Case) -> Iterator[Finding]:
    """Whether the run's shards, checkpoints and caches fit."""
    place = existing(case.settings.general.data_dir)
    need, free = disk_need(case), shutil.disk_usage(place).free
    case.disk_bytes = need.more
    shards = "shards of unknown size" if need.shards is None else f"{gigabytes(need.shards)} shards"
    said = (
        f"{gigabytes(free)} free in {place}; the run needs {gigabytes(need.more)} more "
        f"({shards}, {need.checkpoints // need.checkpoint} checkpoints of "
        f"{gigabytes(need.checkpoint)}, caches)"
    )
    if need.more > free:
        yield Finding(
            "disk space",
            "fail",
            said,
            f"free {gigabytes(need.more - free)}, set DATA_DIR to a larger disk, or lower "
            "TRAIN_KEEP_CHECKPOINTS",
        )
    elif need.shards is None:
        yield Finding(
            "disk space",
            "warn",
            said,
            "set PREPARE_TOTAL_TOKENS to a number; each token takes 2 bytes",
        )
    elif _ROOM_TO_SPARE * need.more > free:
        yield Finding("disk space", "warn", said, "have more room to spare: set DATA_DIR")
    else:
        yield Finding("disk space", "pass", said)
