"""Faults at exact points of what a process writes below a folder."""

import ctypes
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from signal import Signals

from tests.compiled_c import preloaded

_DROP_CAPABILITY = 24
_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH = 1, 2
# Such a path leads to another process's mounts; those of open files lack the beginning.
_IN_NAMESPACE = re.compile(r"^/proc/\d+/root")


@dataclass(frozen=True)
class Point:
    """A moment of a run: before a call that changes the folder, or within a write ("torn")."""

    number: int
    kind: str
    file: str
    bytes: int

    @property
    def what(self) -> str:
        """Shard, lock, folder, or the file's name."""
        name = self.file.removesuffix(".partial")
        return {".": "folder", ".lock": "lock"}.get(
            self.file, "shard" if name.endswith(".bin") else name
        )


@dataclass(frozen=True)
class Fault:
    """What happens at a point: a signal, or an error of this call and the later ones."""

    at: int
    sends: Signals | None = None
    fails: int | None = None


class Faults:
    """The points of processes that write below a folder, and what happens at one of them."""

    def __init__(self, watched: Path) -> None:
        self._watched = watched
        self._library = preloaded(Path(__file__).with_name("faults.c"))
        self.folder = self._library.parent
        self._log = Path(tempfile.mkstemp(prefix="points-", dir=self.folder)[1])

    def environment(self, fault: Fault | None = None) -> dict[str, str]:
        """Variables for the next process; points are counted from now."""
        self._log.write_text("")
        variables = {
            "LD_PRELOAD": self._library,
            "FAULTS_FOLDER": _IN_NAMESPACE.sub("", str(self._watched)),
            "FAULTS_LOG": self._log,
        }
        at = (
            {}
            if fault is None
            else {
                "FAULTS_AT": fault.at,
                "FAULTS_SIGNAL": int(fault.sends or 0),
                "FAULTS_ERRNO": fault.fails or 0,
            }
        )
        return {name: str(value) for name, value in (variables | at).items()}

    def points(self) -> tuple[list[Point], bool]:
        """The points that the latest process passed, and whether it was within the last call."""
        lines = self._log.read_text().splitlines()
        reached = [line.split(" ", 2) for line in lines if line != "-"]
        points = [
            Point(number, kind, file, int(count))
            for number, (kind, count, file) in enumerate(reached, start=1)
        ]
        return points, bool(lines) and lines[-1] != "-"


def bind_root() -> None:
    """Make permissions count for root as well, before the program starts."""
    for capability in (_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH):
        ctypes.CDLL(None).prctl(_DROP_CAPABILITY, capability, 0, 0, 0)
