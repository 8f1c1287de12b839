"""Real prepare processes, each with its own hub, and their output and shards."""

import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path

from app.data.manifest import Manifest
from tests.prepare.conftest import Start
from tests.prepare.loopback_hub import Hub

LIMIT_SECONDS = 300
SETTINGS = {
    "PREPARE_TOTAL_TOKENS": "all",
    "MODEL_CONTEXT_LENGTH": "512",
    "PREPARE_VAL_TOKENS": "1000",
    "PREPARE_SHARD_SIZE": "20000",
    "PREPARE_OUT_DIR": "out",
    "PREPARE_WORKERS": "1",
    "PREPARE_RETRY_SECONDS": "0.2",
    "HF_HUB_DOWNLOAD_TIMEOUT": "1",
    "HF_HUB_ETAG_TIMEOUT": "1",
}


@dataclass(frozen=True)
class Ended:
    """A process that has ended: its exit code and output."""

    code: int
    output: str
    error: str

    @property
    def retries(self) -> list[str]:
        """Return the lines that announce another try."""
        return [line for line in self.output.splitlines() if "; trying again in " in line]

    def assert_done(self, *, retries: int = 0) -> None:
        """Check that it succeeded, with at least so many retries; a busy machine causes more."""
        assert (self.code, self.error) == (0, ""), self
        assert len(self.retries) >= retries, self
        assert all(line.startswith("the hub does not answer: ") for line in self.retries), self

    def assert_refused(self, code: int, *words: str) -> None:
        """Check that it ended with one readable error, a fix, and nothing else."""
        assert self.code == code, self
        lines = self.error.splitlines()
        assert len(lines) == 2, self.error
        assert lines[0].startswith("error: "), self.error
        assert lines[1].startswith("  fix: "), self.error
        assert all(word in self.error for word in words), self.error

    def assert_given_up(self) -> None:
        """Check that it ended because the hub does not answer, after the retry of SETTINGS."""
        self.assert_refused(5, "error: the hub does not answer: ")
        assert self.retries, self
        assert "signed" not in self.output + self.error, (
            "anyone who has such an address can read the file"
        )


@dataclass(frozen=True)
class Running:
    """A process that was started."""

    hub: Hub
    process: subprocess.Popen[str]

    def line(self) -> str:
        """Return the next line of its output; empty at the end."""
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def end(self, *, up_after_retry: bool = False) -> Ended:
        """Wait for its end; optionally bring the hub back up when it retries."""
        limit = threading.Timer(LIMIT_SECONDS, self.process.kill)
        limit.start()
        output = ""
        while line := self.line():
            output += line
            if up_after_retry and "; trying again in " in line:
                self.hub.up()
        _, error = self.process.communicate()
        limit.cancel()
        return Ended(self.process.returncode, output, error)


@dataclass(frozen=True)
class Preparer:
    """Runs prepare in processes, always with the same settings and folder."""

    hub: Hub
    start: Start
    place: Path

    def begin(self, **variables: str) -> Running:
        """Start a process with these variables and SETTINGS."""
        own = {"DATA_DIR": str(self.place), "HF_HOME": str(self.place / "hub-cache")}
        known = {**SETTINGS, **self.hub.variables, **own, **variables}
        return Running(self.hub, self.start("-m", "app", "prepare", **known))

    def run(self, **variables: str) -> Ended:
        """Run a process until it ends."""
        return self.begin(**variables).end()

    @property
    def manifest(self) -> Manifest:
        """Return the folder's manifest."""
        manifest = Manifest.load(self.place / "out")
        assert manifest is not None
        return manifest

    def committed(self) -> dict[str, int]:
        """Return the inode of each shard that the manifest lists."""
        names = [shard.file for shard in self.manifest.shards]
        return {name: (self.place / "out" / name).stat().st_ino for name in names}
