"""Locks against other processes, on file systems with and without flock."""

import errno
import fcntl
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from platform import node
from tempfile import TemporaryFile
from typing import IO, Any

from app.errors import UserError
from app.files import LACKING, warn_once
from app.formats import format_duration

NO_FLOCK = (
    "has no flock: the lock of a process that dies on another machine or in another container "
    "stays, until you delete the folder that the error names"
)
# Long enough for another process that writes a few files.
WAIT_SECONDS = 60.0
# doctor takes a lock for an instant to see whether it is free.
_LEAST_WAIT = 0.5
_IN_THE_WAY = (errno.ENOTEMPTY, errno.EEXIST, errno.EXDEV)


@contextmanager
def locked(
    path: Path, owner: str, *, wait_seconds: float = 0, file: Path | None = None
) -> Iterator[None]:
    """Lock `path` against other processes within the block.

    The kernel releases the lock when the process dies. On a network file system whose client
    machine died, that can take a while. A file system without flock is reported once: see _claim.

    Args:
        path: a folder, or anything with a lock file of its own.
        owner: command that works on such paths, for messages.
        wait_seconds: how long to wait for another process to release the lock.
        file: the lock; `.lock` in the folder by default.

    Raises:
        UserError: another process still holds the lock.
    """
    lock = file or path / ".lock"
    claimed = lock.with_name(f"{lock.name}ed")
    deadline, waits = time.monotonic() + max(wait_seconds, _LEAST_WAIT), wait_seconds > 0
    with lock.open("w") as opened:
        while (is_locked := _flock(opened)) is not True:
            holder = ("", "") if is_locked is False else _claim(claimed)
            if holder is None:
                break
            if time.monotonic() >= deadline:
                raise UserError(
                    f"another process is working on {path}{holder[0]}",
                    f"wait for that {owner} to end, or stop it{holder[1]}",
                )
            if waits:
                message = f"waiting for another {owner} to release {path}"
                print(message, file=sys.stderr, flush=True)
                waits = False
            time.sleep(_LEAST_WAIT / 10)
        try:
            yield
        finally:
            if not is_locked:
                with suppress(OSError):
                    (claimed / _this_process()).unlink()
                    claimed.rmdir()


def _flock(file: IO[Any]) -> bool | None:
    """Try to take the kernel's lock on an open file; None if its file system has none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (*LACKING, errno.ENOLCK):
            error.filename = file.name
            raise
        return None
    return True


def has_flock(folder: Path) -> bool:
    """Return False if the file system of a folder has no flock."""
    with suppress(OSError), TemporaryFile(dir=folder) as file:
        return _flock(file) is not None
    return True


def _claim(claimed: Path) -> tuple[str, str] | None:
    """Take a lock without flock: a folder that holds one file, named after its owner.

    Of several processes that rename a folder of theirs to `claimed` only one succeeds, because a
    folder with a file in it is not replaced. No two owners share a name, so that deleting the file
    of a dead one never deletes another's.

    Returns:
        None if the lock is taken; otherwise which process has it, and advice, as parts of messages.
    """
    warn_once(claimed.parent, NO_FLOCK)
    ours = claimed.with_name(f".lock-{_this_process()}") / _this_process()
    try:
        ours.parent.mkdir(exist_ok=True)
        ours.touch()
        with suppress(OSError):
            for owner in filter(_is_dead, claimed.iterdir()):
                owner.unlink(missing_ok=True)
        # Not every file system renames a folder to the name of an empty one.
        with suppress(OSError):
            claimed.rmdir()
        try:
            ours.parent.rename(claimed)
        except OSError as error:
            # Another process may have released the lock since.
            if error.errno not in _IN_THE_WAY and not claimed.exists():
                raise
        else:
            return None
        details = ""
        with suppress(OSError, ValueError, StopIteration):
            owner = next(claimed.iterdir())
            pid, _, _, host = owner.name.split("_", 3)
            # Both times are by the clock of the file server.
            age = max(0.0, ours.stat().st_mtime - owner.stat().st_mtime)
            details = f": process {pid} on {host}, which began {format_duration(age)} ago"
        return details, f"; if it has died, delete the folder {claimed}"
    finally:
        shutil.rmtree(ours.parent, ignore_errors=True)


def _this_process() -> str:
    return f"{os.getpid()}_{_started(os.getpid())}_{_machine()}_{node()}"


def _machine() -> str:
    """Return a name for where a process number is known: this boot, container and user."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{boot[:8]}-{Path('/proc/self/ns/pid').stat().st_ino}-{os.getuid()}"
    return ""


def _started(pid: int) -> str:
    """Return when a process started, in the kernel's clock; "" if it has ended."""
    with suppress(OSError):
        # The second field, the program's name, may hold spaces and parentheses.
        state, *fields = Path(f"/proc/{pid}/stat").read_text("latin-1").rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]
    return ""


def _is_dead(owner: Path) -> bool:
    """Return True if a process is known to have ended; one of another machine never is."""
    pid, started, machine, *_ = (*owner.name.split("_", 3), "", "")
    return machine == _machine() != "" and _started(int(pid)) != started
