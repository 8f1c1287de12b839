"""Optimizer state that is sharded among the ranks, so that no GPU holds all of it.

Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter models" (2020),
first stage: the optimizer's state is sharded, weights and gradients are not.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, distributed, nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from app.train.optimizer import Optimizers


class ShardedOptimizers(Optimizers):
    """Optimizers in which each rank owns whole parameters, keeps their state and updates them.

    After an update the new weights are broadcast. All ranks must construct it, with the same
    optimizers, before the first step.

    Args:
        whole: optimizers of all parameters, without state; their parameter groups are reused.
    """

    def __init__(self, whole: Optimizers) -> None:
        # The groups contain all of the optimizers' arguments.
        sharded = [ZeroRedundancyOptimizer(part.param_groups, type(part)) for part in whole.parts]
        super().__init__(*sharded, momentum_warmup_steps=whole.momentum_warmup_steps)
        self._own = Optimizers(*(part.optim for part in sharded))

    def state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return the optimizer state of a parameter, by name; empty if another rank owns it."""
        return self._own.state(parameter) if parameter in self._own.part_of else {}

    def load(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        """Copy the state of a parameter into its optimizer if this rank owns it."""
        if parameter in self._own.part_of:
            self._own.load(parameter, state)

    def named_state(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Yield the state of all parameters, broadcast by the ranks that own them.

        Collective: all ranks must iterate to the end. It takes memory for one tensor at a time.
        """
        own = [
            {slot: (value.shape, value.dtype) for slot, value in self.state(parameter).items()}
            for parameter in model.parameters()
        ]
        of_ranks = [own] * distributed.get_world_size()
        distributed.all_gather_object(of_ranks, own)
        for number, (name, parameter) in enumerate(model.named_parameters()):
            owner = next(rank for rank, shapes in enumerate(of_ranks) if shapes[number])
            for slot, (shape, dtype) in of_ranks[owner][number].items():
                value = self.state(parameter).get(slot)
                if value is None:
                    value = torch.empty(shape, dtype=dtype, device=parameter.device)
                distributed.broadcast(value, owner)
                yield f"{slot}.{name}", value

    def join_gather(self, model: nn.Module) -> None:
        """Take part in rank 0's gather of the optimizer state."""
        for _ in self.named_state(model):
            pass
