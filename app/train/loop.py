"""The training loop."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from app.distributed.world import World
from app.errors import NotFiniteError
from app.hardware.device import Device
from app.model.gpt import GPT
from app.train.dataloader import BatchLoader
from app.train.optimizer import LRSchedule, Optimizers


@dataclass(frozen=True)
class StepResult:
    """The measurements of one optimizer step.

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
    compute_loss: Callable[[Tensor, Tensor], Tensor],
    no_sync: Callable[[], AbstractContextManager[None]],
    ranks: World,
    optimizers: Optimizers,
    loader: BatchLoader,
    device: Device,
    schedule: LRSchedule,
    *,
    first_step: int,
    accumulation_steps: int,
    grad_clip: float,
    should_stop: Callable[[bool], bool],
) -> Iterator[StepResult]:
    """Train, and yield after each step; what the caller does in between is not timed.

    Between the start of a step and its one synchronisation nothing waits for the device.

    Args:
        compute_loss: (inputs, targets), int64 [B, T] each, to the model's mean loss.
        no_sync: context for passes whose gradients the ranks do not exchange yet.
        grad_clip: largest gradient norm; 0 for no clipping.
        should_stop: asked before each micro-batch, with whether it is the step's last; true ends
            the loop, without the step begun. For the last the ranks must agree.

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
        for left in reversed(range(accumulation_steps)):
            if should_stop(left == 0):
                return
            inputs, targets = loader.next_batch()
            with no_sync() if left else nullcontext():
                with device.forward_pass():
                    loss = compute_loss(inputs, targets) / accumulation_steps
                loss.backward()
            loss_sum += loss.detach()
        ranks.sum(loss_sum).div_(ranks.size)

        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = get_total_norm(gradients)
        train_loss, grad_norm = torch.stack((loss_sum, norm)).tolist()
        check_finite(step, loss=train_loss, gradient_norm=grad_norm)
        if grad_clip:
            clip_grads_with_norm_(parameters, grad_clip, norm)
        optimizers.step()

        # The device may still be at the update; the next step's synchronisation waits for it.
        seconds = time.perf_counter() - started
        yield StepResult(step, train_loss, learning_rate, grad_norm, seconds)


def check_finite(step: int, **values: float) -> None:
    """Raise NotFiniteError if one of the named values of a step is not a number or infinite."""
    if not all(map(isfinite, values.values())):
        found = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())
        raise NotFiniteError(
            f"step {step}: {found}",
            "lower TRAIN_LEARNING_RATE, lengthen TRAIN_WARMUP_STEPS or clip harder "
            "(TRAIN_GRAD_CLIP), and run again",
        )
