"""The optimizer and its learning rate."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn


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


def build_adamw(
    model: nn.Module,
    *,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    decay_on: Literal["matrices", "all"],
) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov and Hutter, 2019).

    With decay on `matrices`, biases and layer norms, whose scale means something, do not decay.
    """
    parameters = list(model.parameters())
    decayed = [p for p in parameters if decay_on == "all" or p.ndim >= 2]
    rest = [p for p in parameters if decay_on == "matrices" and p.ndim < 2]
    groups = [
        {"params": group, "weight_decay": decay}
        for group, decay in ((decayed, weight_decay), (rest, 0.0))
        if group
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)
