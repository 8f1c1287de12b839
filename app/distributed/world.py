"""The ranks: the processes that train together, and their collectives."""

import ctypes
import datetime
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from app.distributed.launch import launched, launcher_died, restarted
from app.errors import ExitCode, ExitWithCode, RankLostError
from app.signals import exit_now, print_in_handler

_PR_SET_PDEATHSIG = 1
# Parts of the messages of gloo and NCCL for a lost connection.
_CONNECTION_LOST = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "remote process exited",
)
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """All ranks of a run. Every method is collective: all ranks must call it, in the same order.

    Attributes:
        rank: this process's rank; 0 writes the run's folder
        size: number of processes on all machines (world size)
        local_size: number of processes on this machine
        restarted: True if a launcher has restarted the processes after one was lost
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1
    restarted: bool = False

    @property
    def is_rank_zero(self) -> bool:
        """Return True for the rank that writes the run's folder."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Return True if any rank passed True."""
        if self.size == 1:
            return flag
        votes = torch.tensor(int(flag))
        distributed.all_reduce(votes, distributed.ReduceOp.MAX)
        return bool(votes)

    def broadcast(self, value: T) -> T:
        """Return rank 0's value on every rank; what the others pass is ignored."""
        if self.size == 1:
            return value
        values: list[Any] = [value]
        distributed.broadcast_object_list(values, device=torch.device("cpu"))
        return values[0]

    def first(self, value: T | None) -> T | None:
        """Return on every rank the first value that is not None, in the order of the ranks."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            distributed.all_gather_object(values, value)
        return next((value for value in values if value is not None), None)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the ranks, in place, and return it."""
        if self.size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Return once every rank has called it."""
        self.any(False)


def local_rank() -> int:
    """Return this process's index on its machine, also its GPU's index."""
    return int(os.environ["LOCAL_RANK"]) if launched() else 0


@contextmanager
def init_world(device: torch.device, timeout_seconds: float) -> Iterator[World]:
    """Join the processes that an elastic launcher has started. Without one there is one rank.

    Args:
        device: decides the backend: NCCL for GPUs, gloo for CPUs.
        timeout_seconds: after this long without an answer, a rank counts as lost.

    Raises:
        RankLostError: another rank does not answer, or the network fails.
        ExitWithCode: another rank has died, which its launcher reports.
    """
    if not launched():
        yield World()
        return
    _end_with_launcher()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(seconds=timeout_seconds)
    try:
        distributed.init_process_group(backend, timeout=timeout)
        world = World(
            distributed.get_rank(),
            distributed.get_world_size(),
            int(os.environ["LOCAL_WORLD_SIZE"]),
        )
        # A replacement machine's launcher starts its restart count at 0.
        yield replace(world, restarted=world.any(restarted()))
    except RuntimeError as error:
        # gloo raises plain RuntimeErrors, distinguishable only by message.
        message = str(error).partition("\n")[0]
        from_gloo = "gloo" in message or "pair closure" in message
        if not (isinstance(error, distributed.DistError) or from_gloo):
            raise
        if any(words in message for words in _CONNECTION_LOST):
            # The other rank has died, and the launcher reports it.
            raise ExitWithCode(ExitCode.RANK_LOST) from None
        if "timed out" not in message.lower() and "timeout" not in message.lower():
            raise RankLostError(
                f"rank {os.environ['RANK']}: lost contact with the other processes: "
                f"{error!s:.1000}",
                "NCCL_DEBUG=INFO shows more; usual causes: a full /dev/shm, GPUs out of memory, "
                "a driver that is too old",
            ) from error
        raise RankLostError(
            f"rank {os.environ['RANK']}: another rank has not answered for {timeout_seconds:g} s "
            f"({message:.200})",
            "all processes restart from the last checkpoint; raise TRAIN_RANK_TIMEOUT_SECONDS if "
            "ranks are only slow",
        ) from error


def _end_with_launcher() -> None:
    """Stop on SIGTERM, and get one from the kernel if the launcher is killed."""
    # Not an exception: Python drops those that a handler raises while an object is deleted.
    signal.signal(signal.SIGTERM, _stop)
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    # The kernel sends no signal for a launcher that died before this call.
    if launcher_died():
        _stop(signal.SIGTERM, None)


def _stop(number: int, _frame: FrameType | None) -> None:
    print_in_handler("stopped: by SIGTERM")
    exit_now(number)
