"""Evaluations between steps, on all ranks together: the held-out loss and HellaSwag."""

from collections.abc import Iterator, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from app.data.hellaswag import Question
from app.data.token_stream import TokenStream
from app.distributed.world import World
from app.hardware.device import Device
from app.inference.hellaswag import HellaSwag
from app.inference.loss import HeldOutText
from app.model.gpt import GPT
from app.runs.metrics import PauseTimer
from app.train.stopping import Interrupted, StopRequest


class Evaluator:
    """Divides evaluations among the ranks. Both methods are collective.

    Args:
        model: uncompiled.
        micro_batch_size: sequences per forward pass; training, which needs more memory, has as
            many.
        held_out: the held-out split.
        max_tokens: limit on the held-out tokens.
        questions: HellaSwag's; may be empty.
    """

    def __init__(
        self,
        model: GPT,
        device: Device,
        world: World,
        stop: StopRequest,
        pauses: PauseTimer,
        micro_batch_size: int,
        *,
        held_out: TokenStream,
        max_tokens: int,
        questions: Sequence[Question] = (),
    ) -> None:
        length = model.config.context_length
        self._model, self._device, self._world = model, device, world
        self._stop, self._pauses, self._micro_batch_size = stop, pauses, micro_batch_size
        self._held_out = HeldOutText(held_out, length, max_tokens)
        self._hellaswag = HellaSwag(
            questions, length, micro_batch_size * length, world.rank, world.size
        )

    def val_loss(self) -> float | None:
        """Return the held-out loss, nats per token; None if there is no held-out text.

        Raises:
            Interrupted: a signal has come to any rank.
        """
        if not self._held_out.num_sequences:
            return None
        batches = self._held_out.losses(
            self._model,
            self._device,
            self._micro_batch_size,
            rank=self._world.rank,
            world_size=self._world.size,
            check_stop=self._stop.check,
        )
        losses = (losses.double().sum() for losses, _ in batches)
        return self._sum("val_ms", losses, 1).item() / self._held_out.num_sequences

    def hellaswag(self) -> tuple[float, float]:
        """Return lm-eval's acc_norm and acc on the questions.

        Raises:
            Interrupted: a signal has come to any rank.
        """
        counts = self._hellaswag.correct(self._model, self._device, self._stop.check)
        acc_norm, acc = self._sum("hellaswag_ms", counts, 2).tolist()
        return acc_norm / self._hellaswag.num_questions, acc / self._hellaswag.num_questions

    def _sum(self, pause: str, batches: Iterator[Tensor], size: int) -> Tensor:
        """Vote on whether to stop, and sum [size] numbers over batches and ranks, float64."""
        total = torch.zeros(size, dtype=torch.float64, device=self._device.torch_device)
        with self._pauses.measuring(pause):
            with suppress(Interrupted):
                for batch in batches:
                    total += batch.to(total.device)
            if self._world.any(self._stop.requested):
                raise Interrupted
            return self._world.sum(total)
