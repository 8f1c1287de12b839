"""cloud/spot.sh on machines that vanish with their disks; only the bucket, a folder, stays."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import (
    StaticTCPRendezvous,
    create_rdzv_handler,
)
from torch.distributed.run import config_from_args, parse_args

from tests.process_tree import children
from tests.train.processes import CHECKOUT, TINY, Unbroken, Watched, free_port, measured

pytestmark = [pytest.mark.processes, pytest.mark.slow]

# Long enough to be killed halfway. Each machine prepares the dataset of `text_shards`.
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
# Trains until it is stopped.
ENDLESS = {"TRAIN_MAX_STEPS": "1000000"}

# A stand-in for a command: it does something else first.
STAND_IN = """#!/usr/bin/env bash
name=${0##*/} PATH=${PATH#*:} here=$(dirname "$0")
%s
exec "$name" "$@"
"""
# Not for ever, so that a failing test ends.
UNTIL_ALLOWED = """
  trap 'echo "the copying was stopped"; exit 1' TERM
  echo "the bucket is slow: $$"
  for _ in {1..600}; do [[ -e $here/allowed ]] && break; sleep 0.1; done
  [[ -e $here/allowed ]] || echo "nothing else went on"
"""


class Machine:
    """A machine with a disk of its own, which sees the bucket.

    Args:
        folder: its disk.
        bucket: where it is mounted.
        stand_ins: by command, the bash code that runs first.
        variables: of its environment.
    """

    def __init__(
        self, folder: Path, bucket: Path, stand_ins: dict[str, str], **variables: str
    ) -> None:
        self.commands = folder / "commands"
        self.commands.mkdir(parents=True)
        for name, does in stand_ins.items():
            (self.commands / name).write_text(STAND_IN % does)
            (self.commands / name).chmod(0o755)
        checkout = folder / "checkout"
        checkout.mkdir(parents=True)
        for place in ("app", "cloud"):
            (checkout / place).symlink_to(CHECKOUT / place)
        (checkout / ".venv").symlink_to(sys.prefix)
        self.data_dir = folder / "data"
        self.run_dir = self.data_dir / "runs" / JOB["TRAIN_RUN_NAME"]
        self.process = Watched(
            ["bash", "cloud/spot.sh"],
            # The others wait for a machine that waits for its reader.
            in_step="SKYPILOT_NUM_NODES" not in variables,
            cwd=checkout,
            env={
                **os.environ,
                **JOB,
                "DATA_DIR": str(self.data_dir),
                "BUCKET_DIR": str(bucket),
                "KEEP_SECONDS": "0",
                "PATH": f"{self.commands}:{os.environ['PATH']}",
                **variables,
            },
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait_for(self, beginning: str) -> str:
        return self.process.wait_for(beginning)

    def allow(self) -> None:
        """Let a copy that waits UNTIL_ALLOWED continue."""
        (self.commands / "allowed").touch()

    def newest(self) -> str:
        """Return the name of the machine's last checkpoint."""
        states = self.run_dir.glob("checkpoints/step-*/state.json")
        return max(state.parent.name for state in states)

    def torchrun(self) -> tuple[list[str], dict[str, str]]:
        """Return the command line and the environment of its torchrun."""
        for place in children().get(self.process.pid, ()):
            try:
                words = (place / "cmdline").read_text().split("\0")[:-1]
                variables = (place / "environ").read_text().split("\0")[:-1]
            except OSError:
                continue
            if "torch.distributed.run" in words:
                return words, dict(word.split("=", 1) for word in variables)
        pytest.fail("it runs no torchrun")

    def vanish(self) -> None:
        """Kill everything on it at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def end(self) -> tuple[int, str]:
        return self.process.end()


class Cloud:
    """Machines, and the bucket that stays."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.bucket = folder, folder / "bucket"
        self.run = self.bucket / "runs" / JOB["TRAIN_RUN_NAME"]
        self.bucket.mkdir()
        self._machines = ExitStack()
        self._count = 0

    def machine(self, stand_ins: dict[str, str] | None = None, /, **variables: str) -> Machine:
        self._count += 1
        folder = self._folder / f"machine-{self._count}"
        machine = Machine(folder, self.bucket, stand_ins or {}, **variables)
        self._machines.callback(machine.vanish)
        return machine

    def nodes(self, *stand_ins: dict[str, str], addresses: str, **variables: str) -> list[Machine]:
        """Start machines that train together, one for each line of `addresses`."""
        shared = variables | {
            "SKYPILOT_NUM_NODES": str(len(stand_ins)),
            "SKYPILOT_NUM_GPUS_PER_NODE": "1",
            "SKYPILOT_NODE_IPS": addresses,
            "MASTER_PORT": str(free_port()),
        }
        return [
            self.machine(commands, SKYPILOT_NODE_RANK=str(rank), **shared)
            for rank, commands in enumerate(stand_ins)
        ]

    def has(self, machine: Machine, checkpoint: str) -> bool:
        """Return True if the bucket has a machine's dataset and checkpoint."""
        kept = [self.bucket / "text", self.run / "checkpoints" / checkpoint]
        originals = [machine.data_dir / "text", machine.run_dir / "checkpoints" / checkpoint]
        return list(map(contents, kept)) == list(map(contents, originals))

    def close(self) -> None:
        self._machines.close()


@pytest.fixture
def cloud(tmp_path: Path, data_dir: Path) -> Iterator[Cloud]:
    one = Cloud(data_dir.parent)
    yield one
    one.close()


def contents(folder: Path) -> dict[str, bytes]:
    # All but the lock.
    return {place.name: place.read_bytes() for place in folder.glob("[!.]*")}


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
    # The machine's disk is lost with it, but the bucket has the run.
    assert_same_end(cloud.run, expected)
    assert {place.name for place in (cloud.run / "checkpoints").iterdir()} == {
        place.name for place in (second.run_dir / "checkpoints").iterdir()
    }


def test_a_branch_takes_the_other_run_from_the_bucket(cloud: Cloud) -> None:
    code, output = cloud.machine(TRAIN_MAX_STEPS="10").end()
    assert code == 0, output
    branch = {"TRAIN_RUN_NAME": "new", "TRAIN_BRANCH_FROM": "run", "TRAIN_MAX_STEPS": "12"}
    code, output = cloud.machine(**branch).end()
    assert code == 0, output
    assert "taking runs/run from the bucket" in output
    assert "runs/new: a branch of run@10" in output
    new = cloud.run.with_name("new")
    assert measured(new)[:10] == measured(cloud.run)
    assert (new / "checkpoints" / "step-000012" / "state.json").exists()
    # A machine that continues the branch needs the other run no more.
    code, output = cloud.machine(**branch).end()
    assert code == 0, output
    assert "taking runs/new from the bucket" in output
    assert "taking runs/run" not in output


def test_a_half_copied_checkpoint_is_skipped(cloud: Cloud) -> None:
    first = cloud.machine()
    first.wait_for("kept step-")
    first.wait_for("kept step-")
    first.vanish()
    kept = cloud.run / "checkpoints"
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


def test_the_last_checkpoint_is_kept_when_training_ends_during_a_copy(cloud: Cloud) -> None:
    until_trained = """[[ $* != *.safetensors* ]] || {
      while pgrep --session 0 --full "app train" >/dev/null; do sleep 0.1; done
      echo "the training has ended"
    }"""
    machine = cloud.machine({"cp": until_trained})
    machine.wait_for("the training has ended")
    # There is no training process to pass the signal on to.
    machine.process.terminate()
    code, output = machine.end()
    assert code == 0, output
    assert cloud.has(machine, LAST.name), output
    # The earlier checkpoint could wait.
    assert output.index("kept step-000100") < output.index("kept step-000090")


def test_a_checkpoint_stays_in_the_bucket_until_there_is_a_newer_one(cloud: Cloud) -> None:
    takes_one = """[[ $* != *.safetensors* ]] ||
      ! compgen -G "$BUCKET_DIR/runs/run/checkpoints/*/state.json" >/dev/null || exit 1"""
    # No pauses between the last attempts.
    machine = cloud.machine({"cp": takes_one, "sleep": "[[ $1 == 0.2 ]] || exit 0"})
    code, output = machine.end()
    assert code == 1, output
    assert "the last checkpoint could not be copied to the bucket" in output
    (kept,) = (place.parent.name for place in cloud.run.glob("checkpoints/*/state.json"))
    assert not (machine.run_dir / "checkpoints" / kept).exists()
    code, output = cloud.machine().end()
    assert code == 0, output
    assert f"continues at step {int(kept.removeprefix('step-'))}" in output


@pytest.mark.parametrize("command", ("cp", "mkdir", "rm"))
def test_an_error_of_the_bucket_does_not_end_the_job(cloud: Cloud, command: str) -> None:
    old = cloud.run / "checkpoints" / "step-000001"
    old.mkdir(parents=True)
    first_time_fails = """once=$here/$(md5sum <<<"$*" | cut -c -32) file=${*: -2:1}
      [[ $* != *"$BUCKET_DIR/"* || -e $once ]] || {
        touch "$once"
        [[ $name != cp ]] || echo half >"${*: -1}/${file##*/}"
        echo "$name fails"
        exit 1
      }"""
    machine = cloud.machine({command: first_time_fails}, TRAIN_MAX_STEPS="30")
    code, output = machine.end()
    assert code == 0, output
    assert f"{command} fails" in output
    assert cloud.has(machine, "step-000030")


def test_a_slow_copy_does_not_delay_a_stop(cloud: Cloud) -> None:
    slow = f"if [[ $* == *.safetensors* ]]; then {UNTIL_ALLOWED} fi"
    machine = cloud.machine({"cp": slow}, **ENDLESS)
    copying = machine.wait_for("the bucket is slow").split()[-1]
    machine.process.terminate()
    # A shutdown sends the signal to every process.
    os.kill(int(copying), signal.SIGTERM)
    assert "nothing else went on" not in machine.wait_for("stopping:")
    machine.allow()
    code, output = machine.end()
    assert code == 143, output
    assert "the copying was stopped" not in output
    assert cloud.has(machine, machine.newest()), output


def test_several_machines_without_a_shared_disk(cloud: Cloud, unbroken: Unbroken) -> None:
    addresses = "127.0.0.1\n127.0.0.1"
    first, other = cloud.nodes({}, {}, addresses=addresses)
    first.wait_for("kept step-")
    first.vanish()
    other.vanish()
    first, other = cloud.nodes({}, {}, addresses=addresses)
    for machine in (first, other):
        code, output = machine.end()
        assert code == 0, output
        assert "taking runs/run from the bucket" in output
    assert len(measured(first.run_dir)) == 100
    losses = [line["train_loss"] for line in measured(first.run_dir)]
    expected = unbroken(**SAME)
    assert losses == pytest.approx([line["train_loss"] for line in measured(expected)], abs=1e-3)


def test_several_machines_train_while_the_dataset_is_copied_and_stop(cloud: Cloud) -> None:
    slow = f"if [[ $* == *.bin* ]]; then {UNTIL_ALLOWED} fi"
    # The second address belongs to no interface of this machine.
    first, other = cloud.nodes({"cp": slow}, {}, addresses="127.0.0.1\n203.0.113.9", **ENDLESS)
    assert "nothing else went on" not in first.wait_for("step:2/")
    assert not (cloud.bucket / "text" / "manifest.json").exists()
    words, variables = first.torchrun()
    config, _, _ = config_from_args(parse_args(words[words.index("torch.distributed.run") + 1 :]))
    meeting = create_rdzv_handler(
        RendezvousParameters("static", "127.0.0.1:1", "", 2, 2, **config.rdzv_configs)
    )
    assert isinstance(meeting, StaticTCPRendezvous)
    assert meeting.timeout == timedelta(hours=1)
    assert variables["GLOO_SOCKET_IFNAME"] == variables["NCCL_SOCKET_IFNAME"] == "lo"
    _, variables = other.torchrun()
    assert not {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"} & variables.keys()
    for machine in (first, other):
        machine.process.terminate()
    first.allow()
    for machine in (first, other):
        code, output = machine.end()
        assert code == 143, output
    assert cloud.has(first, first.newest())
