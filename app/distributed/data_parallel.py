"""Data-parallel training: gradients are the mean over all ranks."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from app.distributed.world import World

LossFunction = Callable[[Tensor, Tensor], Tensor]


class DataParallelLoss:
    """A loss whose backward pass averages the gradients over the ranks.

    Args:
        model: its weights are broadcast from rank 0.
        loss: (inputs, targets), int64 [B, T] each, to the mean loss of `model`.
        device: the model's device.
        world: with one rank the loss stays as it is.
    """

    def __init__(
        self, model: nn.Module, loss: LossFunction, device: torch.device, world: World
    ) -> None:
        self._loss, self._ddp = loss, None
        if world.size > 1:
            # Dynamo would split the graph at DDP's bucket boundaries in every micro-batch, to
            # overlap an all-reduce that only the last one does.
            torch._dynamo.config.optimize_ddp = False
            self._loss = self._ddp = DistributedDataParallel(
                _LossModule(model, loss),
                device_ids=[device] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                # Otherwise DDP rebuilds its buckets after the first step, and a resumed run would
                # sum in a different order.
                find_unused_parameters=True,
            )
            # Buffers are constants. As an argument it is deprecated, and its successor too new.
            self._ddp.broadcast_buffers = False

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of a micro-batch, int64 [B, T] each."""
        return self._loss(inputs, targets)

    def no_sync(self) -> AbstractContextManager[None]:
        """Return a context for backward passes whose gradients a later pass all-reduces."""
        return self._ddp.no_sync() if self._ddp else nullcontext()


class _LossModule(nn.Module):
    def __init__(self, model: nn.Module, loss: LossFunction) -> None:
        super().__init__()
        self.model, self._loss = model, loss

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self._loss(inputs, targets)
