"""Real `python -m app.cluster prepare` processes, and those that they start."""

import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import suppress
from glob import glob
from pathlib import Path

import numpy as np

from app.data.dataset import ShardVerification, open_dataset
from app.data.manifest import Manifest
from app.data.shards import Split
from tests.faults import Fault, Faults
from tests.prepare.conftest import CHECKOUT
from tests.process_tree import children

PYTHON = CHECKOUT / ".venv-cluster" / "bin" / "python"
LONGEST_SECONDS = 300
TASK_BYTES = 8000


class Cluster:
    """A folder that is prepared by tasks, possibly several times.

    Args:
        place: the folder that DATA_DIR is; the dataset is in `out`.
        settings: environment variables.
    """

    def __init__(self, place: Path, settings: Mapping[str, str]) -> None:
        self.place, self.out, self.parts = place, place / "out", place / "out" / "parts"
        self.slurm_script = self.parts / "datatrove" / "launch_script.slurm"
        self._settings = settings

    def start(
        self, *arguments: str, fault: tuple[Faults, Fault | None] | None = None
    ) -> subprocess.Popen[str]:
        """Start a process that prepares, in its own process group."""
        assert PYTHON.exists(), "make test-cluster makes its environment"
        kept = ("PATH", "HOME", "OMP_NUM_THREADS", "RAY_TMPDIR", "TMPDIR")
        variables = {name: os.environ[name] for name in kept if name in os.environ}
        variables |= {
            "DATA_DIR": str(self.place),
            "PYTHONPATH": str(CHECKOUT),
            "HF_HOME": str(self.place / "hub"),
            "PREPARE_OUT_DIR": "out",
            "PREPARE_WORKERS": "2",
            **self._settings,
        }
        if fault is not None:
            variables |= fault[0].environment(fault[1])
        return subprocess.Popen(
            [PYTHON, "-m", "app.cluster", "prepare", "--task-bytes", str(TASK_BYTES), *arguments],
            cwd=self.place,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(
        self, *arguments: str, fault: tuple[Faults, Fault | None] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Prepare until the process ends."""
        return ended(self.start(*arguments, fault=fault))

    def completions(self) -> set[str]:
        """Return the tasks that are done."""
        # Unlike Path.glob, it ignores a folder that is deleted meanwhile.
        return {Path(name).name for name in glob(f"*/{'[0-9]' * 5}", root_dir=self.parts)}

    def shards_of_parts(self) -> dict[int, str]:
        """Return inode and name of each shard of the tasks that are done."""
        return {
            path.stat().st_ino: f"{path.parent.name}/{path.name}"
            for path in self.parts.glob("*/?????/*.bin")
        }

    def equals(self, single: Path) -> None:
        """Check that the dataset is the single-machine run's, except for the ends of shards."""
        ours, theirs = Manifest.load(self.out), Manifest.load(single)
        assert ours is not None
        assert theirs is not None
        assert ours.complete
        for what in ("source", "settings", "tokenizer"):
            assert getattr(ours, what) == getattr(theirs, what), what
        for what in ("documents", "between"):
            assert ours.counts.get(what) == theirs.counts.get(what), what
        for what in ("skipped", "not_utf8"):
            left_out, of_single = (one.counts.get(what, 0) for one in (ours, theirs))
            is_all = ours.settings["total_tokens"] == "all"
            assert left_out == of_single if is_all else left_out >= of_single, what
        splits: tuple[Split, ...] = ("val", "train")
        for split in splits:
            assert np.array_equal(stream(self.out, split), stream(single, split))
        names = [shard.file for shard in ours.shards]
        assert list(ShardVerification(open_dataset(self.out))) == names
        for split in splits:
            in_split = [shard.file for shard in ours.shards if shard.split == split]
            assert in_split == sorted(in_split)
        assert {path.name for path in self.out.iterdir()} == {*names, "manifest.json", ".lock"}
        most = int(ours.settings["shard_size"])
        assert all(0 < shard.tokens <= most for shard in ours.shards)


def ended(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Wait for the end of a process; if it hangs, kill it and fail."""
    try:
        output, error = process.communicate(timeout=LONGEST_SECONDS)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, output, error)


def stream(folder: Path, split: Split) -> np.ndarray[tuple[int], np.dtype[np.uint16]]:
    """Return all tokens of a split, uint16 [count]."""
    dataset = open_dataset(folder)
    shards = dataset.val if split == "val" else dataset.train
    return np.concatenate([np.empty(0, np.uint16), *(shard[:] for shard in shards)])


def descendants(process: int) -> Iterator[tuple[int, str]]:
    """Yield process id and command line of each descendant of a process."""
    tree = children()
    waiting = [*tree.get(process, ())]
    while waiting:
        one = waiting.pop()
        waiting += tree.get(int(one.name), ())
        with suppress(OSError):
            yield int(one.name), (one / "cmdline").read_text().replace("\0", " ").strip()


_COMMANDS = {
    "sbatch": 'env >>"${0%/*}/given"; echo Submitted batch job 1',
    "scontrol": "echo localhost",
    "srun": 'while [ "${1#-}" != "$1" ]; do [ "$1" = -n ] && shift; shift; done; exec "$@"',
}


class Slurm:
    """Stand-ins for Slurm's commands: sbatch accepts a script, and run_jobs() runs its jobs.

    Args:
        folder: for the commands.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        for name, content in _COMMANDS.items():
            (folder / name).write_text(f"#!/bin/bash\n{content}\n")
            (folder / name).chmod(0o755)
        self._folder = folder
        self.variables = {"PATH": f"{folder}:{os.environ['PATH']}"}

    def run_jobs(self, script: Path) -> int:
        """Run all jobs of a script, one after the other, as Slurm would; return their number."""
        array = "#SBATCH --array=0-"
        (last,) = (
            line.removeprefix(array).partition("%")[0]
            for line in script.read_text().splitlines()
            if line.startswith(array)
        )
        for job in range(int(last) + 1):
            at = {"SLURM_ARRAY_TASK_ID": str(job), "SLURM_NODELIST": "localhost"}
            subprocess.run(
                ["bash", script],
                cwd=self._folder,
                env=self.variables | at,
                check=True,
                capture_output=True,
                timeout=LONGEST_SECONDS,
            )
        return int(last) + 1
