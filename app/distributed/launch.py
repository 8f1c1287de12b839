"""The launcher: one process per GPU of this machine, restarted together if one dies."""

import logging
import os
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from app.containers import LAUNCHER
from app.errors import ExitCode, UserError
from app.formats import plural
from app.hardware.proc import child_processes, usable_cores
from app.progress import print_line
from app.signals import exit_code_of, exit_now, on_stop_signals, print_in_handler

# So is a kill, whose exit code is negative here. NETWORK needs a wait; all others would recur.
_WORTH_A_RESTART = (ExitCode.BUG, ExitCode.RANK_LOST)
# Set for the processes of a restart. They continue the run even with TRAIN_RESUME=never.
_RESTARTED = "GPT_COMPOSE_RESTARTED"


def launched() -> bool:
    """Return True if an elastic launcher, ours or torchrun, has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def restarted() -> bool:
    """Return True if the launcher has restarted this process after one was lost."""
    return _RESTARTED in os.environ or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def launcher_died() -> bool:
    """Return True if our launcher started this process, and has ended since."""
    return os.environ.get(LAUNCHER) not in (None, str(os.getppid()))


def processes_to_launch(
    requested: int | Literal["auto"], device: Literal["auto", "cpu", "cuda", "mps"]
) -> int:
    """Return how many processes train on this machine; 1 if a launcher started this process.

    Args:
        requested: number of processes; auto: one per GPU.
        device: the kind of device on which they train.

    Raises:
        UserError: there are fewer GPUs than processes.
    """
    if launched() or requested == 1:
        return 1
    if device == "mps" or (device == "auto" and sys.platform == "darwin"):
        if requested == "auto":
            return 1
        raise UserError(
            f"TRAIN_PROCESSES={requested}, but only one process can train on Apple's GPU",
            "set TRAIN_PROCESSES=auto, or TRAIN_DEVICE=cpu",
        )
    if requested == "auto":
        may_be_several = device != "cpu" and _may_have_several_gpus()
        return max(1, _count_gpus()) if may_be_several else 1
    if device != "cpu" and 0 < (gpus := _count_gpus()) < requested:
        raise UserError(
            f"TRAIN_PROCESSES={requested}, but this machine has {gpus} GPUs",
            "set TRAIN_PROCESSES=auto for one process per GPU",
        )
    return requested


def _may_have_several_gpus() -> bool:
    """Return False if the system shows one GPU at most, without importing torch.

    NVIDIA's driver has a device file per GPU, and a container has those passed to it. WSL
    (dxg) and AMD's driver (kfd) have one file for all. A process sees one MIG slice only.
    """
    several = len(list(Path("/dev").glob("nvidia[0-9]*"))) > 1
    return several or Path("/dev/dxg").exists() or Path("/dev/kfd").exists()


def _count_gpus() -> int:
    """Return how many GPUs torch sees; CUDA_VISIBLE_DEVICES limits them."""
    print_line("starting torch to count the GPUs")
    import torch

    return torch.cuda.device_count()


def launch(command: list[str], processes: int, max_restarts: int) -> int:
    """Run a command in several processes until all have ended; restart them if one has died.

    Args:
        command: command line of each process, without Python itself.
        processes: how many; each finds its rank in RANK, WORLD_SIZE and LOCAL_RANK.
        max_restarts: maximum number of restarts.

    Returns:
        0, or the exit code of the first process that failed; 128 + N after signal N.
    """
    # The launcher's log repeats what the processes print.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # torch warns of find_unused_parameters, which app.distributed.data_parallel needs.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # All processes are on this machine, which may have no other network.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    cores = usable_cores()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    os.environ[LAUNCHER] = str(os.getpid())
    request = _Request()
    with on_stop_signals(request.pass_on, request.insist):
        code = _run_once(command, processes)
        for left in reversed(range(max_restarts)):
            if request.number or (code >= 0 and code not in _WORTH_A_RESTART):
                break
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            print(
                f"a process has died ({how}): restarting all processes from the last checkpoint; "
                f"{plural(left, 'restart')} left",
                file=sys.stderr,
                flush=True,
            )
            os.environ[_RESTARTED] = "1"
            code = _run_once(command, processes)
    if request.insists or (request.number and (code < 0 or code in _WORTH_A_RESTART)):
        return exit_code_of(request.number)
    if code == ExitCode.RANK_LOST:
        return ExitCode.BUG
    return 128 - code if code < 0 else code


def _run_once(command: list[str], processes: int) -> int:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id="gpt-compose",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        signals_to_handle="SIGQUIT",
        # Otherwise each start leaves a temporary folder.
        logs_specs=DefaultLogsSpecs(os.devnull),
    )
    try:
        elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        # A process that lost another one, or was terminated because of it, is not the cause.
        later = (ExitCode.RANK_LOST, ExitCode.SIGTERM, -signal.SIGTERM)
        if ExitCode.RANK_LOST in codes:
            codes = [code for code in codes if code not in later]
        return next(iter(codes), ExitCode.RANK_LOST)
    return ExitCode.DONE


@dataclass
class _Request:
    """A signal to the launcher, which it passes on: the processes know what to save."""

    number: int = 0
    insists: bool = False

    def pass_on(self, number: int) -> None:
        self.number = number
        _send(number, number)

    def insist(self, number: int) -> None:
        self.insists = True
        _send(signal.SIGKILL, number)


def _send(number: int, requested: int) -> None:
    """Send all processes a signal. If there are none yet, exit with the code of `requested`."""
    children = child_processes(os.getpid())
    if not children:
        print_in_handler("stopped: no process was running; the same command continues")
        exit_now(requested)
    for child in children:
        with suppress(ProcessLookupError):
            os.kill(child, number)
