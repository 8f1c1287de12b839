"""Optimizer state that the processes share out, so that no GPU holds all of it.

Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter models" (2020),
first stage: the optimizer's state is divided, weights and gradients are not.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, distributed, nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from app.train.optimizer import Optimizers


class ShardedOptimizers(Optimizers):
    """Optimizers of which each process has whole parameters, keeps their state and updates them.

    After an update everybody gets everybody's new weights. All processes construct it, with the
    same optimizers, before their first step.

    Args:
        whole: of all parameters, without state; their groups are taken over.
    """

    def __init__(self, whole: Optimizers) -> None:
        # The groups have all that the optimizers' own arguments said.
        parts = [ZeroRedundancyOptimizer(part.param_groups, type(part)) for part in whole.parts]
        super().__init__(*parts)
        self._own = Optimizers(*(part.optim for part in parts))

    def state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return the optimizer state of a parameter, by name; empty if another process keeps it."""
        return self._own.state(parameter) if self._owns(parameter) else {}

    def load(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        """Take copies of what was kept of a parameter's past if this process is to keep it."""
        if self._owns(parameter):
            self._own.load(parameter, state)

    def named_state(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """The state of all parameters, from whoever has it, on every process.

        All processes must go through it to the end. One tensor at a time is more than what this
        process keeps.
        """
        own = [
            {slot: (value.shape, value.dtype) for slot, value in self.state(parameter).items()}
            for parameter in model.parameters()
        ]
        of_ranks = [own] * distributed.get_world_size()
        distributed.all_gather_object(of_ranks, own)
        for number, (name, parameter) in enumerate(model.named_parameters()):
            keeper = next(rank for rank, kept in enumerate(of_ranks) if kept[number])
            for slot, (shape, dtype) in of_ranks[keeper][number].items():
                value = self.state(parameter).get(slot)
                if value is None:
                    value = torch.empty(shape, dtype=dtype, device=parameter.device)
                distributed.broadcast(value, keeper)
                yield f"{slot}.{name}", value

    def join_gather(self, model: nn.Module) -> None:
        """Do this process's part while the first one goes through `named_state`."""
        for _ in self.named_state(model):
            pass

    def _owns(self, parameter: nn.Parameter) -> bool:
        return any(
            held is parameter
            for part in self._own.parts
            for group in part.param_groups
            for held in group["params"]
        )
