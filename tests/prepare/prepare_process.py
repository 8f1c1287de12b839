"""Real `python -m app prepare` processes, and faults at exact points of what they write."""

import gzip
import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import SIGSTOP

import pyarrow as pa
import pyarrow.parquet as pq

from app.data.manifest import Manifest
from tests.faults import Fault, Faults, Point, bind_root
from tests.prepare.conftest import CHECKOUT

STORY = "the cat sat on a mat and it rained in Spain: 3 times 7 é 😀"


# A copy of a source's file has another time.
_CHANGED = re.compile(rb'(?<="changed": )\d+')


@dataclass(frozen=True)
class Ended:
    """A process that has ended: its exit code, what it printed, the points it passed."""

    code: int
    output: str
    error: str
    points: list[Point]


class Preparation:
    """A folder that is prepared, again and again, by processes in which a fault may occur.

    Args:
        place: the folder that DATA_DIR is.
        settings: environment variables.
        python: the interpreter.
    """

    def __init__(
        self, place: Path, settings: Mapping[str, str], python: str | Path = sys.executable
    ) -> None:
        self.place, self.out, self._python = place, place / "out", python
        self.settings = settings
        self._faults = Faults(self.out)

    def start(self, workers: int = 1, fault: Fault | None = None) -> subprocess.Popen[str]:
        """Start a process that prepares."""
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        settings = {
            "DATA_DIR": self.place,
            "PYTHONPATH": CHECKOUT,
            "PREPARE_OUT_DIR": "out",
            "PREPARE_WORKERS": workers,
            **self.settings,
        }
        variables = {name: str(value) for name, value in settings.items()}
        return subprocess.Popen(
            [self._python, "-m", "app", "prepare"],
            cwd=self._faults.folder,
            env=kept | variables | self._faults.environment(fault),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=bind_root,
        )

    def end(self, process: subprocess.Popen[str]) -> Ended:
        """Wait for the end of a process."""
        output, error = process.communicate(timeout=300)
        return Ended(process.returncode, output, error, self.points()[0])

    def run(self, workers: int = 1, fault: Fault | None = None) -> Ended:
        """Prepare until the dataset is complete or a fault ends the process."""
        return self.end(self.start(workers, fault))

    @contextmanager
    def stopped(self, at: int) -> Iterator[subprocess.Popen[str]]:
        """Provide a process that is stopped at a point, until SIGCONT."""
        process = self.start(fault=Fault(at, SIGSTOP))
        try:
            _, status = os.waitpid(process.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status), f"ended before point {at}"
            yield process
        finally:
            process.kill()
            process.communicate()

    def committed(self) -> dict[str, tuple[int, int, int]]:
        """Return inode, time of change and tokens of each shard that the manifest lists."""
        manifest = Manifest.load(self.out)
        files = {shard.file: shard.tokens for shard in manifest.shards} if manifest else {}
        stats = {file: (self.out / file).stat() for file in files}
        return {file: (stat.st_ino, stat.st_mtime_ns, files[file]) for file, stat in stats.items()}

    def points(self) -> tuple[list[Point], bool]:
        """Return the points that the last process passed, and True if it was within a call."""
        return self._faults.points()


@dataclass(frozen=True)
class Unbroken:
    """A run without a fault, whose files every other run must produce."""

    settings: Mapping[str, str]
    contents: dict[str, tuple[int, str]]
    points: list[Point]

    def again(self, place: Path) -> Preparation:
        """Return the same preparation in another folder."""
        return Preparation(place, self.settings)

    def is_reached_by(self, preparation: Preparation, workers: int = 1) -> Ended:
        """Continue to the end: the shards that exist stay, and the folder becomes the same."""
        before = preparation.committed()
        ended = preparation.run(workers)
        assert ended.code == 0, ended
        assert contents(preparation.out) == self.contents
        assert before.items() <= preparation.committed().items()
        if before and len(before) < len(preparation.committed()):
            tokens = sum(tokens for *_, tokens in before.values())
            assert f"{preparation.out}: continues after {tokens:,} tokens" in ended.output
        return ended


def unbroken(place: Path, settings: Mapping[str, str]) -> Unbroken:
    """Prepare without a fault."""
    preparation = Preparation(place, settings)
    ended = preparation.run()
    assert ended.code == 0, ended
    return Unbroken(settings, contents(preparation.out), ended.points)


def contents(folder: Path) -> dict[str, tuple[int, str]]:
    """Return size and SHA-256 of every file in a folder."""
    return {
        path.relative_to(folder).as_posix(): (
            len(content),
            hashlib.sha256(content).hexdigest(),
        )
        for path in folder.rglob("*")
        if path.is_file()
        for content in [_CHANGED.sub(b"", path.read_bytes())]
    }


def _texts(seed: int, count: int) -> list[str]:
    draw, words = random.Random(seed), STORY.split(" ")
    return [" ".join(draw.choices(words, k=draw.randrange(20, 120))) for _ in range(count)]


def parquet_source(folder: Path, rows: int = 60, shard_size: int = 8000) -> dict[str, str]:
    """Write files of several row groups, with a document of several shards and empty rows."""
    folder.mkdir()
    for number in range(4):
        texts: list[str | None] = [*_texts(number, rows)]
        texts[rows // 2 : rows // 2 + 2] = ["", None]
        if number == 1:
            texts[rows // 3] = " ".join(_texts(99, 150))
        table = pa.table({"id": range(len(texts)), "text": texts})
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=16)
    return _settings(folder, total="all", val=1000, shard=shard_size)


def mixed_source(folder: Path) -> dict[str, str]:
    """Write text and JSON lines, compressed or not; the limit is within a document."""
    (folder / "deep").mkdir(parents=True)
    for number in range(6):
        texts = _texts(number, 40)
        lines = [json.dumps({"text": text}).encode() + b"\n" for text in ["", *texts]]
        (folder / f"rows{number}.jsonl").write_bytes(b"".join(lines))
        (folder / f"rows{number}.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[:20])))
        (folder / "deep" / f"{number}.md").write_text("\n".join(texts[:9]))
        (folder / f"{number}.txt.gz").write_bytes(gzip.compress("".join(texts).encode()))
        (folder / f"latin{number}.txt").write_bytes(texts[0].encode("utf-16"))
    (folder / "long.txt").write_text("\n".join(_texts(99, 150)))
    return _settings(folder, total="27000", val=6000, shard=2500)


def library_source() -> dict[str, str]:
    """Return the settings for Python's own standard library."""
    return _settings("stdlib", total="60000", val=1000, shard=10_000)


def _settings(dataset: Path | str, total: str, val: int, shard: int) -> dict[str, str]:
    return {
        "PREPARE_DATASET": str(dataset),
        "PREPARE_TOTAL_TOKENS": total,
        "PREPARE_VAL_TOKENS": str(val),
        "PREPARE_SHARD_SIZE": str(shard),
    }
