"""Evaluations between steps, on all ranks together: the held-out loss and HellaSwag."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from app.distributed.world import World
from app.hardware.device import Device
from app.inference.hellaswag import HellaSwag
from app.inference.loss import HeldOutText
from app.model.language_model import LanguageModel
from app.runs.metrics import PauseTimer
from app.train.stopping import Interrupted, StopRequest


@dataclass(frozen=True)
class Evaluator:
    """Measures a model, uncompiled. Both methods are collective, and the ranks share the work.

    Both raise Interrupted if a signal has come to any rank.
    """

    model: LanguageModel
    device: Device
    world: World
    stop: StopRequest
    pauses: PauseTimer
    held_out: HeldOutText
    hellaswag_questions: HellaSwag

    def val_loss(self, batch_size: int) -> float | None:
        """Return the held-out loss, nats per token; None if there is no held-out text."""
        if not self.held_out.num_sequences:
            return None
        batches = self.held_out.losses(
            self.model,
            self.device,
            batch_size,
            rank=self.world.rank,
            world_size=self.world.size,
            check_stop=self.stop.check,
        )
        here = self.device.float64_device
        sums = (losses.to(here).double().sum() for losses, _ in batches)
        total = self._sum("val_ms", 1, sums)
        return total.item() / self.held_out.num_sequences

    def hellaswag(self) -> tuple[float, float]:
        """Return lm-eval's acc_norm and acc."""
        counts = self.hellaswag_questions.correct(self.model, self.device, self.stop.check)
        total = self._sum("hellaswag_ms", 2, counts) / len(self.hellaswag_questions.questions)
        acc_norm, acc = total.tolist()
        return acc_norm, acc

    def _sum(self, pause: str, size: int, batches: Iterator[Tensor]) -> Tensor:
        """Vote on whether to stop, and sum [size] numbers over batches and ranks."""
        total = torch.zeros(size, dtype=torch.float64, device=self.device.float64_device)
        with self.pauses.measuring(pause):
            with suppress(Interrupted):
                for batch in batches:
                    total += batch.to(total.device)
            if self.world.any(self.stop.requested):
                raise Interrupted
            return self.world.sum(total)
