"""cloud/spot.sh on machines that vanish with their disks: the bucket, here a folder, is left."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.train.processes import CHECKOUT, TINY, Unbroken, free_port, measured

pytestmark = pytest.mark.processes

# Long enough to be killed in the middle of it. What `text_shards` holds, prepared on the machine.
JOB = TINY | {
    "TRAIN_MAX_STEPS": "100",
    "TRAIN_CHECKPOINT_EVERY": "10",
    "TRAIN_VAL_EVERY": "0",
    "TRAIN_SAMPLE_EVERY": "0",
    "PREPARE_DATASET": "stdlib",
    "PREPARE_TOTAL_TOKENS": "6000",
    "PREPARE_VAL_TOKENS": "1000",
    "PREPARE_SHARD_SIZE": "2500",
    "PREPARE_OUT_DIR": "text",
}
SAME = {
    name: JOB[name] for name in JOB if name.startswith("TRAIN_") and JOB[name] != TINY.get(name)
}
LAST = Path("checkpoints/step-000100")


class Machine:
    """A machine with a disk of its own, which sees the bucket."""

    def __init__(self, folder: Path, bucket: Path, **variables: str) -> None:
        checkout = folder / "checkout"
        checkout.mkdir(parents=True)
        for place in ("app", "cloud", "recipes"):
            (checkout / place).symlink_to(CHECKOUT / place)
        (checkout / ".venv").symlink_to(sys.prefix)
        self.data_dir = folder / "data"
        self.run_dir = self.data_dir / "runs" / JOB["TRAIN_RUN_NAME"]
        self.process = subprocess.Popen(
            ["bash", "cloud/spot.sh"],
            cwd=checkout,
            env={
                **os.environ,
                **JOB,
                "DATA_DIR": str(self.data_dir),
                "BUCKET_DIR": str(bucket),
                "KEEP_SECONDS": "0.1",
                **variables,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def wait_for(self, beginning: str) -> None:
        assert self.process.stdout is not None
        before = []
        for line in self.process.stdout:
            if line.startswith(beginning):
                return
            before.append(line)
        pytest.fail(f"no line began with {beginning!r}: {''.join(before)}")

    def vanish(self) -> None:
        """Kill everything on it at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def end(self) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=300)
        return self.process.returncode, output


class Cloud:
    """Machines, and the bucket that stays."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.bucket = folder, folder / "bucket"
        self.bucket.mkdir()
        self._machines = ExitStack()
        self._count = 0

    def machine(self, **variables: str) -> Machine:
        self._count += 1
        machine = Machine(self._folder / f"machine-{self._count}", self.bucket, **variables)
        self._machines.callback(machine.vanish)
        return machine

    def close(self) -> None:
        self._machines.close()


@pytest.fixture
def cloud(tmp_path: Path, data_dir: Path) -> Iterator[Cloud]:
    # data_dir: an environment without settings
    one = Cloud(data_dir.parent)
    yield one
    one.close()


def assert_same_end(one: Path, other: Path) -> None:
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (one / LAST / file).read_bytes() == (other / LAST / file).read_bytes()
    assert measured(one) == measured(other)


def test_another_machine_continues_from_the_bucket(cloud: Cloud, unbroken: Unbroken) -> None:
    first = cloud.machine()
    first.wait_for("kept step-")
    first.vanish()
    second = cloud.machine()
    code, output = second.end()
    assert code == 0, output
    assert "taking text from the bucket" in output
    assert "continues at step " in output
    expected = unbroken(**SAME)
    assert_same_end(second.run_dir, expected)
    # All that the machine had goes with it, but the bucket has the run.
    kept = cloud.bucket / "runs" / JOB["TRAIN_RUN_NAME"]
    assert_same_end(kept, expected)
    assert {place.name for place in (kept / "checkpoints").iterdir()} == {
        place.name for place in (second.run_dir / "checkpoints").iterdir()
    }


def test_a_half_copied_checkpoint_is_not_the_one_that_continues(cloud: Cloud) -> None:
    first = cloud.machine()
    first.wait_for("kept step-")
    first.wait_for("kept step-")
    first.vanish()
    kept = cloud.bucket / "runs" / JOB["TRAIN_RUN_NAME"] / "checkpoints"
    before, last = sorted(place for place in kept.iterdir() if (place / "state.json").exists())[-2:]
    (last / "state.json").unlink()
    os.truncate(last / "optimizer.safetensors", 1000)
    code, output = cloud.machine().end()
    assert code == 0, output
    assert f"it is now {last.name}.damaged" in output
    assert f"continues at step {int(before.name.removeprefix('step-'))}" in output


def test_a_stop_is_passed_on_and_the_checkpoint_kept(cloud: Cloud) -> None:
    stopped = cloud.machine(TRAIN_CHECKPOINT_EVERY="0")
    stopped.wait_for("step:1/")
    stopped.process.terminate()
    code, output = stopped.end()
    assert code == 143, output
    (saved,) = (stopped.run_dir / "checkpoints").iterdir()
    assert f"kept {saved.name} in the bucket" in output


def test_several_machines_without_a_shared_disk(cloud: Cloud, unbroken: Unbroken) -> None:
    def machines() -> list[Machine]:
        shared = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "1"}
        shared |= {"SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
        shared |= {"MASTER_PORT": str(free_port(10_000, 20_000))}
        return [cloud.machine(SKYPILOT_NODE_RANK=rank, **shared) for rank in ("0", "1")]

    first, other = machines()
    first.wait_for("kept step-")
    first.vanish()
    other.vanish()
    first, other = machines()
    for machine in (first, other):
        code, output = machine.end()
        assert code == 0, output
        assert "taking runs/run from the bucket" in output
    assert len(measured(first.run_dir)) == 100
    losses = [line["train_loss"] for line in measured(first.run_dir)]
    expected = unbroken(**SAME)
    assert losses == pytest.approx([line["train_loss"] for line in measured(expected)], abs=1e-3)
