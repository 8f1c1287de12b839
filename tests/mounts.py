"""Small real file systems."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest


def alone(*kinds: str) -> list[str]:
    """The beginning of a command in name spaces of its own, as a user may have them, or as root."""
    for user in (["-Ur"], []) if shutil.which("unshare") else ():
        command = ["unshare", *user, *kinds]
        if not subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
            return command
    pytest.skip(f"this user may not run unshare {' '.join(kinds)}")


@dataclass
class Mounted:
    """A tmpfs of its own, in a name space that a shell keeps."""

    shell: subprocess.Popen[str]
    folder: Path
    fault = None
    forbidden = "Read-only file system"

    @property
    def place(self) -> Path:
        return Path(f"/proc/{self.shell.pid}/root{self.folder}")

    def fill(self) -> None:
        with (self.place / "filler").open("wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(100)):
                pass

    def make_room(self, size: str = "1m") -> None:
        self._mount(f"-o remount,size={size}", self.folder)

    def forbid(self, folder: Path) -> None:
        """Cover it; the lock that is held keeps what is below from becoming read-only."""
        below = self.folder / folder.relative_to(self.place)
        self._mount("--bind", below, below)
        self._mount("-o remount,bind,ro", below)

    def allow(self, folder: Path) -> None:
        self._mount("-o remount,bind,rw", self.folder / folder.relative_to(self.place))

    def is_mounted(self) -> bool:
        """Return True if the shell says that all went well so far."""
        assert self.shell.stdout is not None
        return self.shell.stdout.readline() == "0\n"

    def _mount(self, options: str, *places: Path) -> None:
        quoted = " ".join(f"'{place}'" for place in places)
        assert self.shell.stdin is not None
        print(f"mount {options} {quoted}; echo $?", file=self.shell.stdin, flush=True)
        assert self.is_mounted()


@contextmanager
def small_tmpfs(folder: Path, size: str, *name_space: str) -> Iterator[Mounted]:
    mount = f'mount -t tmpfs -o size={size} none "$0" && echo $? && exec sh'
    with subprocess.Popen(
        ["unshare", *name_space, "sh", "-c", mount, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as shell:
        yield Mounted(shell, folder)
        shell.kill()
