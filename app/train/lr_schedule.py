"""The learning rate over the steps of a run."""

import math
from dataclasses import dataclass
from typing import Literal, Self

from app.settings.train import TrainSettings


@dataclass(frozen=True)
class LRSchedule:
    """A linear warm-up, then a constant learning rate, a decay, or one after the other.

    Attributes:
        peak: highest learning rate
        decay: constant; cosine or linear to `min_ratio` of the peak at the last step; or wsd
            (warm-up, stable, decay): constant, then linear over the cool-down
        warmup_steps: steps of the warm-up; the first one uses peak / warmup_steps, not 0
        max_steps: number of steps of the run
        min_ratio: last learning rate as a fraction of the peak
        cooldown: fraction of the steps over which wsd decays
    """

    peak: float
    decay: Literal["constant", "cosine", "linear", "wsd"]
    warmup_steps: int
    max_steps: int
    min_ratio: float
    cooldown: float = 0.0

    @classmethod
    def from_settings(
        cls, cfg: TrainSettings, begun_with: int | None = None, planned_steps: int | None = None
    ) -> Self:
        """Return the schedule of a run; TRAIN_WARMUP_STEPS=auto is 1% of its steps.

        Args:
            begun_with: the warm-up of a run that continues, perhaps to more steps: auto keeps it.
            planned_steps: number of steps if a time limit has decided it.
        """
        max_steps = cfg.max_steps if planned_steps is None else planned_steps
        auto = round(0.01 * max_steps) if begun_with is None else begun_with
        warmup = auto if cfg.warmup_steps == "auto" else cfg.warmup_steps
        return cls(
            cfg.learning_rate,
            cfg.lr_schedule,
            warmup,
            max_steps,
            cfg.min_lr_ratio,
            cfg.cooldown,
        )

    def replanned(self, cfg: TrainSettings, steps_completed: int, planned_steps: int) -> Self:
        """Return the schedule of a run whose time limit changes the number of steps."""
        warmup = self.warmup_steps
        if steps_completed < warmup:
            # One of `auto` length ends with the steps that were measured, at the earliest.
            warmup = max(steps_completed, min(warmup, round(0.01 * planned_steps)))
        return self.from_settings(cfg, warmup, planned_steps)

    @property
    def decay_start(self) -> int:
        """Return the first step whose learning rate has begun to decay; max_steps if none has."""
        if self.decay == "constant":
            return self.max_steps
        if self.decay == "wsd":
            return max(self.warmup_steps, self.max_steps - round(self.cooldown * self.max_steps))
        return self.warmup_steps

    @property
    def cooldown_start(self) -> int | None:
        """Return the steps before the cool-down; None if the schedule has none."""
        return self.decay_start if self.decay == "wsd" else None

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of step 0 … max_steps-1."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        start = self.decay_start
        if step < start:
            return self.peak
        progress = (step + 1 - start) / (self.max_steps - start)
        ratio = (1 + math.cos(math.pi * progress)) / 2 if self.decay == "cosine" else 1 - progress
        return self.peak * (self.min_ratio + (1 - self.min_ratio) * ratio)
