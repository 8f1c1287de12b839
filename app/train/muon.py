"""Muon: momentum whose update is made orthogonal.

Jordan et al., "Muon: an optimizer for hidden layers" (2024). torch has one too, but it
handles one matrix at a time, always in bf16, which takes a CPU 25 times as long as float32.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

# The quintic whose iteration drives all singular values into about [0.7, 1.2].
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay, for matrices.

    Updates are scaled to AdamW's typical size (Liu et al., "Muon is scalable for LLM training",
    2025), so AdamW's learning rates and weight decay carry over.

    Args:
        stacked: matrices of equal shape that each parameter stores one below the other; each is
            made orthogonal on its own.
        dtype: dtype of the iterations; bf16 and fp16 are as good, where they are fast.
    """

    state_names = ("momentum_buffer",)

    def __init__(
        self,
        parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        stacked: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "stacked": stacked,
            "dtype": dtype,
        }
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every matrix that has a gradient; `closure` is ignored."""
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for (rows, columns), parameters in by_shape.items():
                directions = torch.stack(self._directions(parameters, group["momentum"]))
                matrices = directions.view(-1, rows // group["stacked"], columns)
                if group["dtype"] == torch.float16:
                    # Gradients are often too small for fp16; of unit norm, they are not.
                    matrices = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-30)
                matrices = matrices.to(group["dtype"])
                size = 0.2 * math.sqrt(max(matrices.shape[1:]))
                updates = newton_schulz(matrices).float().reshape(directions.shape)
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, updates.unbind(), alpha=-group["lr"] * size)

    def _directions(self, parameters: list[nn.Parameter], momentum: float) -> tuple[Tensor, ...]:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        return torch._foreach_lerp(gradients, buffers, momentum)


def newton_schulz(matrices: Tensor) -> Tensor:
    """Return the nearest orthogonal matrices, roughly, by Newton-Schulz iterations.

    Args:
        matrices: float32, bfloat16 or float16 [n, rows, columns]

    Returns:
        the same dtype [n, rows, columns], singular values in about [0.7, 1.2]
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C)
        x = torch.baddbmm(x, polynomial, x, beta=_A)
    return x.mT if tall else x
