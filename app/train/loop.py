"""The training loop."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from app.data.loader import BatchLoader
from app.errors import NotFiniteError
from app.model.gpt import GPT
from app.train.device import Device
from app.train.optimizer import Optimizers, Schedule


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step measured.

    Attributes:
        step: its number, from 0
        train_loss: mean over the step's tokens, nats per token, before the update
        lr: learning rate
        grad_norm: of all gradients together, before clipping
        seconds: the step took
    """

    step: int
    train_loss: float
    lr: float
    grad_norm: float
    seconds: float


def train_steps(
    model: GPT,
    compiled: Callable[[Tensor, Tensor], Tensor],
    optimizers: Optimizers,
    loader: BatchLoader,
    device: Device,
    schedule: Schedule,
    *,
    first_step: int,
    accumulation_steps: int,
    grad_clip: float,
    should_stop: Callable[[], bool],
) -> Iterator[StepResult]:
    """Train, and yield after each step; what the caller does in between is not timed.

    Between the start of a step and its one synchronisation nothing waits for the device.

    Args:
        compiled: (inputs, targets), int64 [B, T] each, to the model's mean loss.
        grad_clip: largest gradient norm; 0 for no clipping.
        should_stop: asked before each micro-batch; true ends the loop, without the step begun.

    Raises:
        NotFiniteError: loss or gradient norm are not finite; that update is not made.
    """
    parameters = list(model.parameters())
    model.train()
    for step in range(first_step, schedule.max_steps):
        started = time.perf_counter()
        learning_rate = schedule.rate(step)
        optimizers.set_learning_rate(learning_rate)

        loss_sum = torch.zeros((), device=device.torch_device)
        for _ in range(accumulation_steps):
            if should_stop():
                return
            inputs, targets = loader.next_batch()
            with device.forward_pass():
                loss = compiled(inputs, targets) / accumulation_steps
            loss.backward()
            loss_sum += loss.detach()

        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = get_total_norm(gradients)
        train_loss, grad_norm = torch.stack((loss_sum, norm)).tolist()
        refuse_not_finite(step, loss=train_loss, gradient_norm=grad_norm)
        if grad_clip:
            clip_grads_with_norm_(parameters, grad_clip, norm)
        optimizers.step()

        # The device may still be at the update; the next step's synchronisation waits for it.
        seconds = time.perf_counter() - started
        yield StepResult(step, train_loss, learning_rate, grad_norm, seconds)


def refuse_not_finite(step: int, **values: float) -> None:
    """Raise NotFiniteError if one of the named values of a step is not a number or infinite."""
    if not all(map(isfinite, values.values())):
        found = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())
        raise NotFiniteError(
            f"step {step}: {found}",
            "lower TRAIN_LEARNING_RATE, lengthen TRAIN_WARMUP_STEPS or clip harder "
            "(TRAIN_GRAD_CLIP), and run again: it continues from the last checkpoint",
        )
