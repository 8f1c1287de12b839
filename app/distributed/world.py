"""The processes that train together: which one this is, and what they agree on."""

import ctypes
import datetime
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from app.distributed.launch import launched
from app.errors import ExitCode, ExitWithCode, RankLostError
from app.signals import exit_now, print_in_handler
from app.train.compile import LossFunction

_PR_SET_PDEATHSIG = 1
# The words of gloo and NCCL for a lost connection.
_CONNECTION_LOST = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "pair closure",
    "remote process exited",
)
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process and the others.

    Attributes:
        rank: of this process; 0 writes the run's folder
        size: processes of all machines
        local_size: processes of this machine
        restarted: a launcher has started them once more, after one was lost
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
        """Return True if any rank's flag is set; every rank must call it."""
        if self.size == 1:
            return flag
        votes = torch.tensor(int(flag))
        distributed.all_reduce(votes, distributed.ReduceOp.MAX)
        return bool(votes)

    def broadcast(self, value: T) -> T:
        """The first rank's value; every rank must ask, the others' own is not looked at."""
        if self.size == 1:
            return value
        values: list[Any] = [value]
        distributed.broadcast_object_list(values, device=torch.device("cpu"))
        return values[0]

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in place, on the tensor's device."""
        if self.size > 1:
            distributed.all_reduce(tensor)
        return tensor


def local_rank() -> int:
    """Number of this process on its machine: of its GPU."""
    return int(os.environ["LOCAL_RANK"]) if launched() else 0


@contextmanager
def init_world(device: torch.device, timeout_seconds: float) -> Iterator[World]:
    """Belong to the group of processes of an elastic launcher; without one, be alone.

    Args:
        timeout_seconds: a rank that does not answer for so long is lost.
    """
    if not launched():
        yield World()
        return
    _end_with_launcher()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(seconds=timeout_seconds)
    try:
        distributed.init_process_group(backend, timeout=timeout)
        ranks = World(
            distributed.get_rank(),
            distributed.get_world_size(),
            int(os.environ["LOCAL_WORLD_SIZE"]),
        )
        # A machine that replaces a lost one has a new launcher.
        begins_again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
        yield replace(ranks, restarted=ranks.any(begins_again))
    except RuntimeError as error:
        # gloo raises plain RuntimeErrors: only their words tell.
        said = str(error).partition("\n")[0]
        if not (
            isinstance(error, distributed.DistError) or "gloo" in said or "pair closure" in said
        ):
            raise
        if any(words in said for words in _CONNECTION_LOST):
            # It has died, and the launcher says so.
            raise ExitWithCode(ExitCode.RANK_LOST) from None
        if "timed out" not in said.lower() and "timeout" not in said.lower():
            raise RankLostError(
                f"rank {os.environ['RANK']}: the processes lose each other: {error!s:.1000}",
                "NCCL_DEBUG=INFO tells more; usual causes: a full /dev/shm, GPUs without memory, "
                "a driver that is too old",
            ) from error
        raise RankLostError(
            f"rank {os.environ['RANK']}: another rank has not answered for {timeout_seconds:g} s "
            f"({said:.200})",
            "all begin again from the last checkpoint; a longer TRAIN_RANK_TIMEOUT_SECONDS waits",
        ) from error


def data_parallel(
    model: nn.Module, loss_of: LossFunction, device: torch.device, ranks: World
) -> tuple[LossFunction, Callable[[], AbstractContextManager[None]]]:
    """A loss whose gradients become the mean over all ranks.

    Args:
        model: of `loss_of`; the first rank's weights are everyone's.

    Returns:
        the loss, and a context for passes whose gradients stay where they are until a later one.
    """
    if ranks.size == 1:
        return loss_of, nullcontext
    # Dynamo would cut compiled code at DDP's buckets, in every pass, to overlap the exchange of the
    # last one with it.
    torch._dynamo.config.optimize_ddp = False
    module = DistributedDataParallel(
        _Loss(model, loss_of),
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        # Otherwise it regroups the gradients after its first step, and a continued run would add
        # them up in another order.
        find_unused_parameters=True,
    )
    return module, module.no_sync


class _Loss(nn.Module):
    def __init__(self, model: nn.Module, loss_of: LossFunction) -> None:
        super().__init__()
        self.model, self._loss_of = model, loss_of

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self._loss_of(inputs, targets)


def _end_with_launcher() -> None:
    """Be stopped when the launcher says so, or dies: it may be killed, and then cannot say it."""
    # Where an object is deleted, Python shows an exception that a handler raises, and drops it.
    signal.signal(signal.SIGTERM, _stop)
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _stop(number: int, _frame: FrameType | None) -> None:
    print_in_handler("stopped: by SIGTERM")
    exit_now(number)
