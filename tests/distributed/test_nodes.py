"""torchrun on two machines, which are network namespaces joined by a cable.

Without the right to make them, as in the test image, they are two addresses of this machine:
127.0.0.2 and 127.0.0.3.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.train.processes import Process, Unbroken, free_port, losses

pytestmark = [pytest.mark.processes, pytest.mark.slow]

SETTINGS = {
    "TRAIN_MAX_STEPS": 20,
    "TRAIN_VAL_EVERY": 0,
    "TRAIN_SAMPLE_EVERY": 0,
}


@dataclass(frozen=True)
class Machine:
    """A machine: the command that enters it, its address, network interface and a free port."""

    enter: tuple[str, ...]
    address: str
    interface: str
    port: int

    def launch(
        self,
        data_dir: Path,
        nodes: str,
        meeting: "Machine",
        *,
        in_step: bool = False,
        **changes: object,
    ) -> Process:
        """Start torchrun here; the rendezvous is on the machine `meeting`."""
        rendezvous = {
            "is_host": str(meeting is self).lower(),
            "join_timeout": 300,
            "last_call_timeout": 20,
            "keep_alive_interval": 1,
            "keep_alive_max_attempt": 10,
        }
        launcher = (
            *("-m", "torch.distributed.run", f"--nnodes={nodes}", "--nproc-per-node=1"),
            *("--rdzv-backend=c10d", "--rdzv-id=test"),
            f"--rdzv-endpoint={meeting.address}:{meeting.port}",
            f"--rdzv-conf={','.join(f'{name}={value}' for name, value in rendezvous.items())}",
            *(f"--local-addr={self.address}", "--max-restarts=3"),
        )
        return Process(
            data_dir,
            (*self.enter, sys.executable, *launcher, "-m", "app", "train"),
            in_step,
            **SETTINGS | changes,
            GLOO_SOCKET_IFNAME=self.interface,
            # Otherwise a replacement of a lost machine looks for the others at its address.
            TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1,
            TORCH_CPP_LOG_LEVEL="ERROR",
        )


@pytest.fixture
def machines() -> Iterator[tuple[Machine, Machine]]:
    names = [f"gpt-compose-{os.getpid()}-{number}" for number in (1, 2)]
    if not all(is_made(f"ip netns add {name}") for name in names):
        # Tests run side by side.
        port = free_port()
        yield Machine((), "127.0.0.2", "lo", port), Machine((), "127.0.0.3", "lo", port)
        return
    try:
        assert is_made(
            f"ip link add eth0 netns {names[0]} type veth peer name eth0 netns {names[1]}"
        )
        for name, address in zip(names, ("10.77.0.1", "10.77.0.2"), strict=True):
            assert is_made(f"ip -n {name} address add {address}/24 dev eth0")
            assert is_made(f"ip -n {name} link set eth0 up")
            assert is_made(f"ip -n {name} link set lo up")
        one, two = (("ip", "netns", "exec", name) for name in names)
        yield Machine(one, "10.77.0.1", "eth0", 29400), Machine(two, "10.77.0.2", "eth0", 29400)
    finally:
        for name in names:
            assert is_made(f"ip netns delete {name}")


def is_made(command: str) -> bool:
    words = command.split()
    return (
        shutil.which(words[0]) is not None
        and subprocess.run(words, capture_output=True).returncode == 0
    )


def lose(machine: Process) -> None:
    """Kill all processes of a machine at once."""
    for process in (machine.process.pid, *machine.workers().values()):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    machine.end()


def assert_same_losses(run_dir: Path, unbroken: Unbroken) -> None:
    alone = unbroken(**SETTINGS)
    torch.testing.assert_close(losses(run_dir), losses(alone), rtol=0, atol=1e-5)


def test_two_machines_take_the_steps_of_one_process(
    machines: tuple[Machine, Machine], data_dir: Path, unbroken: Unbroken
) -> None:
    one, two = (machine.launch(data_dir, "2", machines[0]) for machine in machines)
    for process in (one, two):
        code, output = process.end()
        assert code == 0, output
    assert_same_losses(one.run_dir, unbroken)


def test_when_a_machine_is_lost_the_other_continues_alone(
    machines: tuple[Machine, Machine], data_dir: Path, unbroken: Unbroken
) -> None:
    first, _ = machines
    # TRAIN_RESUME=never applies to the first start only.
    left, lost = (
        machine.launch(data_dir, "1:2", first, in_step=machine is first, TRAIN_RESUME="never")
        for machine in machines
    )
    left.wait_for("2 x CPU")
    left.wait_for("step:9/")
    lose(lost)
    left.wait_for(f"{left.run_dir}: continues at step ")
    left.wait_for("CPU")
    code, output = left.end()
    assert code == 0, output
    assert_same_losses(left.run_dir, unbroken)


def test_the_machine_of_rank_zero_can_be_replaced(
    machines: tuple[Machine, Machine], data_dir: Path, unbroken: Unbroken
) -> None:
    first, other = machines
    lost, left = (
        machine.launch(data_dir, "2", other, in_step=machine is first, TRAIN_RESUME="never")
        for machine in machines
    )
    lost.wait_for("step:9/")
    lose(lost)
    new = first.launch(data_dir, "2", other, TRAIN_RESUME="never")
    for process in (left, new):
        code, output = process.end()
        assert code == 0, output
    assert_same_losses(left.run_dir, unbroken)


def test_a_machine_with_another_data_dir_is_refused(
    machines: tuple[Machine, Machine], data_dir: Path, text_shards: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "text").symlink_to(text_shards)
    folders = (data_dir, elsewhere)
    one, two = (
        machine.launch(folder, "2", machines[0])
        for machine, folder in zip(machines, folders, strict=True)
    )
    _, output = two.end()
    lose(one)
    assert "exists on the first machine but not on this one" in output
    assert "mount one folder as DATA_DIR on all machines" in output
