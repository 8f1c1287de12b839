"""The optimizers and their learning rate."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from app.settings.train import TrainSettings
from app.train.muon import Muon


@dataclass(frozen=True)
class LRSchedule:
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
        """Return the optimizer state of a parameter, by name."""
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

    def join_gather(self, model: nn.Module) -> None:
        """Do this process's part while the first one goes through `named_state`: nothing."""


def build_optimizers(
    model: nn.Module, chosen: TrainSettings, dtype: torch.dtype = torch.float32
) -> Optimizers:
    """Build AdamW for every parameter, or Muon for the blocks' matrices and AdamW for the rest.

    AdamW: Loshchilov and Hutter, 2019. Muon: app.train.muon; both take one learning rate.
    The embeddings are matrices too, but each of their rows stands for itself: AdamW's.
    With decay on `matrices`, biases and layer norms, whose scale means something, do not decay.

    Args:
        dtype: of Muon's iterations.
    """
    embeddings = {one.weight for one in model.modules() if isinstance(one, nn.Embedding)}
    for_adamw: dict[float, list[nn.Parameter]] = {chosen.weight_decay: [], 0.0: []}
    for_muon = []
    for parameter in model.parameters():
        is_matrix = parameter.ndim == 2
        if chosen.optimizer == "muon" and is_matrix and parameter not in embeddings:
            for_muon.append(parameter)
        else:
            decays = is_matrix or chosen.weight_decay_on == "all"
            for_adamw[chosen.weight_decay if decays else 0.0].append(parameter)
    groups = [{"params": held, "weight_decay": decay} for decay, held in for_adamw.items() if held]
    parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, betas=chosen.betas, fused=True)]
    if for_muon:
        parts.append(Muon(for_muon, weight_decay=chosen.weight_decay, dtype=dtype))
    return Optimizers(*parts)
