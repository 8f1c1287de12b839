"""Real prepare processes, each with a hub of its own, and what they say and leave."""

import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from app.data.manifest import Manifest
from tests.prepare.conftest import Start
from tests.prepare.loopback_hub import Hub

LIMIT_SECONDS = 30
SETTINGS = {
    "PREPARE_TOTAL_TOKENS": "all",
    "PREPARE_VAL_TOKENS": "1000",
    "PREPARE_SHARD_SIZE": "20000",
    "PREPARE_OUT_DIR": "out",
    "PREPARE_WORKERS": "1",
    "PREPARE_RETRY_SECONDS": "0.2",
    "HF_HUB_DOWNLOAD_TIMEOUT": "1",
    "HF_HUB_ETAG_TIMEOUT": "1",
}


@dataclass(frozen=True)
class ExitWithCode:
    """What a process said, and when it was done."""

    code: int
    output: str
    error: str
    seconds: float

    @property
    def retries(self) -> list[str]:
        """The lines that tell of another try."""
        return [line for line in self.output.splitlines() if "; trying again in " in line]

    def assert_done(self, *, retries: int = 0) -> None:
        """It succeeded, after so many visible retries; a busy machine may cause more."""
        assert (self.code, self.error) == (0, ""), self
        assert len(self.retries) >= retries, self
        assert all(line.startswith("the hub does not answer: ") for line in self.retries), self

    def assert_refused(self, code: int, *said: str) -> None:
        """It ended with one readable error, a fix, and nothing else."""
        assert self.code == code, self
        lines = self.error.splitlines()
        assert len(lines) == 2, self.error
        assert lines[0].startswith("error: "), self.error
        assert lines[1].startswith("  fix: "), self.error
        assert all(word in self.error for word in said), self.error

    def assert_given_up(self) -> None:
        """It ended because the hub does not answer, after the visible retry of SETTINGS."""
        self.assert_refused(5, "error: the hub does not answer: ")
        assert self.retries, self
        assert "signed" not in self.output + self.error, "whoever has such an address may read"


@dataclass(frozen=True)
class Running:
    """A process that was begun."""

    hub: Hub
    process: subprocess.Popen[str]
    begun: float

    def line(self) -> str:
        """The next line of its output; empty at its end."""
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def end(self, *, up_after_retry: bool = False) -> ExitWithCode:
        """Wait for its end; a hub that is down comes back after a retry."""
        limit = threading.Timer(LIMIT_SECONDS, self.process.kill)
        limit.start()
        output = ""
        while line := self.line():
            output += line
            if up_after_retry and "; trying again in " in line:
                self.hub.up()
        _, error = self.process.communicate()
        limit.cancel()
        return ExitWithCode(self.process.returncode, output, error, time.monotonic() - self.begun)


@dataclass(frozen=True)
class Preparer:
    """Runs prepare in processes of its own, always with the same settings and folder."""

    hub: Hub
    start: Start
    place: Path

    def begin(self, **variables: str) -> Running:
        """Start a process; these variables come on top of SETTINGS."""
        own = {"DATA_DIR": str(self.place), "HF_HOME": str(self.place / "hub-cache")}
        known = {**SETTINGS, **self.hub.variables, **own, **variables}
        begun = time.monotonic()
        return Running(self.hub, self.start("-m", "app", "prepare", **known), begun)

    def run(self, **variables: str) -> ExitWithCode:
        """Run a process to its end."""
        return self.begin(**variables).end()

    @property
    def manifest(self) -> Manifest:
        """The manifest that is there."""
        found = Manifest.load(self.place / "out")
        assert found is not None
        return found

    def committed(self) -> dict[str, int]:
        """The shards that the manifest lists, and what shows whether they are still the same."""
        names = [shard.file for shard in self.manifest.shards]
        return {name: (self.place / "out" / name).stat().st_ino for name in names}
