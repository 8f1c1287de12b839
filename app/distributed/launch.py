"""One process for each GPU of the machine, by torch's elastic launcher."""

import logging
import os
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from app.errors import ExitCode, UserError
from app.hardware.proc import child_processes
from app.settings.train import TrainSettings
from app.signals import exit_code_of, exit_now, on_stop_signals, print_in_handler
from app.train.console import print_line

# Other codes would only come again; a killed process has a negative one.
_WORTH_A_RESTART = (ExitCode.BUG, ExitCode.RANK_LOST)


def launched() -> bool:
    """Return True if an elastic launcher, ours or torchrun, has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def processes_to_launch(chosen: TrainSettings) -> int:
    """Return how many processes are to train on this machine; 1 in one that a launcher has started.

    Raises:
        UserError: there are fewer GPUs.
    """
    wanted = chosen.processes
    if launched() or wanted == 1:
        return 1
    if wanted == "auto":
        may_be_several = chosen.device != "cpu" and _may_have_several_gpus()
        return max(1, _count_gpus()) if may_be_several else 1
    if chosen.device != "cpu" and 0 < (gpus := _count_gpus()) < wanted:
        raise UserError(
            f"TRAIN_PROCESSES={wanted}, but this machine has {gpus} GPUs",
            "set TRAIN_PROCESSES=auto for one process per GPU",
        )
    return wanted


def _may_have_several_gpus() -> bool:
    """Return False if the system shows one GPU at most, without importing torch.

    NVIDIA's driver has a device file for each GPU, and a container those that it was given. WSL
    (dxg) and AMD's driver (kfd) have one for all. Of a GPU in parts (MIG) a process gets one part.
    """
    several = len(list(Path("/dev").glob("nvidia[0-9]*"))) > 1
    return several or Path("/dev/dxg").exists() or Path("/dev/kfd").exists()


def _count_gpus() -> int:
    """Return how many GPUs torch would use, of those that CUDA_VISIBLE_DEVICES leaves."""
    print_line("starting torch to count the GPUs")
    import torch

    return torch.cuda.device_count()


def launch(command: list[str], processes: int, max_restarts: int) -> int:
    """Run a command in several processes until all have ended, and again if one has died.

    Args:
        command: what each process runs, without Python itself.
        processes: how many; RANK, WORLD_SIZE and LOCAL_RANK tell each which one it is.
        max_restarts: how often all of them begin again because one has died.

    Returns:
        0, or the exit code of the first that failed; 128 and its number for a signal.
    """
    # Its log helps only its authors.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # torch warns of find_unused_parameters in app.distributed.world, which is meant.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # All are on this machine, which may have no other network.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    request = _Request()
    with on_stop_signals(request.pass_on, request.insist):
        code = _run_once(command, processes)
        for left in reversed(range(max_restarts)):
            if request.number or (code >= 0 and code not in _WORTH_A_RESTART):
                break
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            print(
                f"a process has died ({how}): all begin again from the last checkpoint; "
                f"{left} such restarts are left",
                file=sys.stderr,
                flush=True,
            )
            # A first start may have been told to refuse what is there now.
            code = _run_once([*command, "--resume", "auto"], processes)
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
        # Otherwise each start leaves a temporary folder behind.
        logs_specs=DefaultLogsSpecs(os.devnull),
    )
    try:
        elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        # A process that lost another, or was ended because of that, has not failed first.
        later = (ExitCode.RANK_LOST, ExitCode.SIGTERM, -signal.SIGTERM)
        first = [code for code in codes if code != ExitCode.RANK_LOST]
        if ExitCode.RANK_LOST in codes:
            first = [code for code in codes if code not in later]
        return next(iter(first), ExitCode.RANK_LOST)
    return ExitCode.DONE


@dataclass
class _Request:
    """A signal that is passed on to the processes: only they know what to save."""

    number: int = 0
    insists: bool = False

    def pass_on(self, number: int) -> None:
        self.number = number
        _send(number, number)

    def insist(self, number: int) -> None:
        self.insists = True
        _send(signal.SIGKILL, number)


def _send(number: int, asked: int) -> None:
    """Send all processes a signal; without any, this one ends as what was asked for says."""
    children = child_processes(os.getpid())
    if not children:
        print_in_handler("stopped: nothing has begun; the same command continues")
        exit_now(asked)
    for child in children:
        with suppress(ProcessLookupError):
            os.kill(child, number)
