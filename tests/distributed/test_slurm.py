"""cloud/train.slurm as Slurm runs it, by a stand-in that starts real torchruns as two nodes."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from tests.train.processes import (
    CHECKOUT,
    TINY,
    Unbroken,
    Watched,
    free_port,
    losses,
    measured,
)

pytestmark = pytest.mark.processes

SCRIPT = CHECKOUT / "cloud" / "train.slurm"
# One task per node; it keeps their process numbers, to signal them as Slurm does.
SRUN = """\
#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
for node in 0 1; do
  SLURM_NODEID=$node "$@" & echo $! >>tasks
done
highest=0
for task in $(jobs -p); do
  wait "$task" || { code=$?; ((code <= highest)) || highest=$code; }
done
exit $highest
"""
SCONTROL = """\
#!/usr/bin/env bash
echo "$*" >>requests
[[ $1 != show ]] || printf '127.0.0.1\\n127.0.0.1\\n'
"""


class Cluster:
    """Two nodes on this machine, whose shared folder is the working directory."""

    def __init__(self, folder: Path, data_dir: Path) -> None:
        self.folder, self.run_dir = folder, data_dir / "runs" / TINY["TRAIN_RUN_NAME"]
        self._ending = ExitStack()
        (folder / ".venv").symlink_to(sys.prefix)
        programs = folder / "programs"
        programs.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        self._environment = {
            **os.environ,
            **TINY,
            "DATA_DIR": str(data_dir),
            "PATH": f"{programs}:{os.environ['PATH']}",
            "SLURM_JOB_ID": str(free_port() - 10_000),
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_GPUS_ON_NODE": "1",
            # The address of each node.
            "PET_LOCAL_ADDR": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo",
        }

    def submit(self, **changes: str) -> Watched:
        """Start the job for the first time or again."""
        for file in ("tasks", "requests"):
            (self.folder / file).unlink(missing_ok=True)
        job = Watched(
            ["bash", str(SCRIPT)],
            cwd=self.folder,
            env=self._environment | changes,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._ending.callback(self._kill, job)
        return job

    def signal(self, number: signal.Signals) -> None:
        """Signal every task but not the job's own shell."""
        for task in (self.folder / "tasks").read_text().split():
            os.kill(int(task), number)

    @property
    def is_requeued(self) -> bool:
        """Return True if the job has requested to be started again."""
        job = self._environment["SLURM_JOB_ID"]
        requests = self.folder / "requests"
        return requests.exists() and f"requeue {job}" in requests.read_text().splitlines()

    def close(self) -> None:
        self._ending.close()

    @staticmethod
    def _kill(job: subprocess.Popen[str]) -> None:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
        job.communicate()


@pytest.fixture
def cluster(tmp_path: Path, data_dir: Path) -> Iterator[Cluster]:
    folder = tmp_path / "shared"
    folder.mkdir()
    one = Cluster(folder, data_dir)
    yield one
    one.close()


@pytest.mark.slow
def test_a_job_that_slurm_stops_saves_is_requeued_and_continues(
    cluster: Cluster, unbroken: Unbroken
) -> None:
    stopped = cluster.submit()
    stopped.wait_for("step:1/")
    cluster.signal(signal.SIGTERM)
    code, output = stopped.end()
    assert code != 0
    assert "stopped: " in output
    saved = [path.name for path in (cluster.run_dir / "checkpoints").iterdir()]
    assert saved == [f"step-{len(measured(cluster.run_dir)):06}"]
    assert cluster.is_requeued

    code, output = cluster.submit().end()
    assert code == 0, output
    assert f"continues at step {int(saved[0].removeprefix('step-'))}" in output
    assert "2 x " in output
    assert not cluster.is_requeued
    torch.testing.assert_close(losses(cluster.run_dir), losses(unbroken()), rtol=0, atol=1e-5)

    code, output = cluster.submit().end()
    assert code == 0, output
    assert "is finished: all 10 steps are done" in output


@pytest.mark.slow
def test_a_failure_that_would_repeat_is_not_requeued(cluster: Cluster) -> None:
    code, output = cluster.submit(SLURM_GPUS_ON_NODE="many").end()
    assert code != 0
    assert "Unsupported nproc_per_node value: many" in output
    assert not cluster.is_requeued


def test_a_wrong_setting_ends_the_job_before_a_task_starts(cluster: Cluster) -> None:
    code, output = cluster.submit(TRAIN_MAX_STEPS="-1").end()
    assert code != 0
    assert "TRAIN_MAX_STEPS=-1 (environment): must be more than 0" in output
    assert not (cluster.folder / "tasks").exists()


def test_slurm_leaves_time_for_the_checkpoint() -> None:
    (ahead,) = re.findall(r"^#SBATCH --signal=TERM@(\d+)$", SCRIPT.read_text(), re.MULTILINE)
    (allowed,) = re.findall(r"SHUTDOWN_TIMEOUT=(\d+)$", SCRIPT.read_text(), re.MULTILINE)

    assert int(allowed) < int(ahead)
