"""The optimizers and their learning rate."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from app.train.muon import Muon


@dataclass(frozen=True)
class Schedule:
    """Learning rate over the steps of a run: a linear warm-up, then constant or a decay.

    Attributes:
        peak: the highest rate
        shape: constant; cosine or linear decay to `min_ratio` of the peak at the last step
        warmup_steps: the first of them has rate peak/warmup_steps, not 0
    """

    peak: float
    shape: Literal["constant", "cosine", "linear"]
    warmup_steps: int
    max_steps: int
    min_ratio: float

    def rate(self, step: int) -> float:
        """Learning rate of step 0 … max_steps-1."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.shape == "constant":
            return self.peak
        progress = (step + 1 - self.warmup_steps) / (self.max_steps - self.warmup_steps)
        left = (1 + math.cos(math.pi * progress)) / 2 if self.shape == "cosine" else 1 - progress
        return self.peak * (self.min_ratio + (1 - self.min_ratio) * left)


class Optimizers:
    """One or more torch optimizers that together hold every parameter once."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts

    def set_learning_rate(self, rate: float) -> None:
        """The rate of the next step, for all parameters."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate

    def step(self) -> None:
        """Update every parameter from its gradient, and drop the gradients."""
        for part in self.parts:
            part.step()
            part.zero_grad(set_to_none=True)

    def state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What is kept of a parameter's past, by name."""
        owner = next(
            part
            for part in self.parts
            for group in part.param_groups
            if any(held is parameter for held in group["params"])
        )
        return owner.state[parameter]

    def load(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        """Take copies of what was kept of a parameter's past, by name."""
        self.state(parameter).update(
            {name: value.to(parameter.device, copy=True) for name, value in state.items()}
        )

    def named_state(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """The state of all parameters of `model`, as `exp_avg.transformer.wte.weight`."""
        for name, parameter in model.named_parameters():
            for slot, value in self.state(parameter).items():
                yield f"{slot}.{name}", value

    def hand_over(self, model: nn.Module) -> None:
        """Do this process's part while the first one goes through `named_state`: nothing."""


def build_optimizers(
    model: nn.Module,
    name: Literal["adamw", "muon"],
    *,
    betas: tuple[float, float],
    weight_decay: float,
    decay_on: Literal["matrices", "all"],
    muon_dtype: torch.dtype = torch.float32,
) -> Optimizers:
    """AdamW for every parameter, or Muon for the matrices of the blocks and AdamW for the rest.

    AdamW: Loshchilov and Hutter, 2019. Muon: app.train.muon; both take one rate.
    The embeddings are matrices too, but each of their rows stands for itself: AdamW's.
    With decay on `matrices`, biases and layer norms, whose scale means something, do not decay.
    """
    embeddings = {
        weight
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for weight in module.parameters()
    }
    parameters = list(model.parameters())
    orthogonal = [p for p in parameters if name == "muon" and p.ndim == 2 and p not in embeddings]
    rest = [p for p in parameters if not any(p is taken for taken in orthogonal)]
    groups = [
        {
            "params": [p for p in rest if (decay_on == "all" or p.ndim == 2) == decays],
            "weight_decay": weight_decay if decays else 0.0,
        }
        for decays in (True, False)
    ]
    parts: list[torch.optim.Optimizer] = [
        torch.optim.AdamW([group for group in groups if group["params"]], betas=betas, fused=True)
    ]
    if orthogonal:
        parts.append(Muon(orthogonal, weight_decay=weight_decay, dtype=muon_dtype))
    return Optimizers(*parts)
