"""The training loop."""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import count
from math import isfinite

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from app.distributed.data_parallel import DataParallelLoss
from app.distributed.world import World
from app.errors import NotFiniteError
from app.hardware.device import Device
from app.model.language_model import LanguageModel
from app.runs.metrics import StepRecord
from app.train.dataloader import BatchLoader
from app.train.loss_scale import LossScale
from app.train.lr_schedule import LRSchedule
from app.train.optimizer import Optimizers


def train_steps(
    model: LanguageModel,
    parallel: DataParallelLoss,
    optimizers: Optimizers,
    loader: BatchLoader,
    schedule: Callable[[], LRSchedule],
    device: Device,
    world: World,
    *,
    first_step: int,
    accumulation_steps: int,
    grad_clip: float,
    loss_scale: LossScale | None = None,
    should_stop: Callable[[bool], bool],
) -> Iterator[StepRecord]:
    """Train, and yield the record of each step; the caller's work in between is not timed.

    Nothing waits for the device between the start of a step and its one synchronization.

    Args:
        parallel: the loss of `model`, compiled or not.
        schedule: called before each step, because the number of steps may change between them.
        grad_clip: gradient norm to clip to; 0 for no clipping.
        loss_scale: loss scaling, which fp16 needs.
        should_stop: called before each micro-batch with True if it is the step's last. True ends
            the loop and discards the step. At the last micro-batch all ranks must return the same
            value.

    Raises:
        NotFiniteError: loss or gradient norm is not finite; that update is skipped.
    """
    parameters = list(model.parameters())
    model.train()
    for step in count(first_step):
        if step >= schedule().max_steps:
            return
        started = time.perf_counter()
        learning_rate = schedule().learning_rate(step)
        optimizers.begin_step(step, learning_rate)
        used_scale = loss_scale.factor if loss_scale else None
        # The backward pass divides by the number of micro-batches, which is not to decide what fp16
        # can represent.
        factor = None if used_scale is None else used_scale * accumulation_steps

        tokens, loss_sum = 0, torch.zeros((), device=device.torch_device)
        for micro_batch in range(accumulation_steps):
            is_last = micro_batch == accumulation_steps - 1
            if should_stop(is_last):
                return
            inputs, targets = loader.next_batch()
            with nullcontext() if is_last else parallel.no_sync():
                with device.forward_pass():
                    loss = parallel.loss(inputs, targets) / accumulation_steps
                # The gradient of the loss multiplied by the factor.
                loss.backward(None if factor is None else torch.full_like(loss, factor))
            tokens += world.size * inputs.numel()
            loss_sum += loss.detach()
        world.sum(loss_sum).div_(world.size)

        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = get_total_norm(gradients)
        train_loss, grad_norm = torch.stack((loss_sum, norm)).tolist()
        skipped = loss_scale is not None and loss_scale.skips(train_loss, grad_norm)
        if skipped:
            optimizers.skip_step()
        else:
            if factor is not None:
                torch._foreach_mul_(gradients, 1 / factor)
                norm, grad_norm = norm / factor, grad_norm / factor
            check_finite(step, {"loss": train_loss, "gradient norm": grad_norm}, used_scale)
            if grad_clip:
                clip_grads_with_norm_(parameters, grad_clip, norm)
            optimizers.step()

        # The device may still be updating; the next step's synchronization waits for it.
        seconds = time.perf_counter() - started
        yield StepRecord(
            step=step,
            tokens=(step + 1) * tokens,
            train_loss=train_loss,
            lr=learning_rate,
            grad_norm=None if skipped else grad_norm,
            step_ms=1000 * seconds,
            tokens_per_second=tokens / seconds,
            data_ms=1000 * loader.take_waited_seconds(),
            loss_scale=used_scale,
            skipped=skipped or None,
        )


def check_finite(step: int, values: dict[str, float], loss_scale: float | None = None) -> None:
    """Raise NotFiniteError if one of a step's values, by name, is infinite or not a number.

    Args:
        loss_scale: the loss scale with which they came about, in fp16.
    """
    if not all(map(isfinite, values.values())):
        named = ", ".join(f"{name} {value}" for name, value in values.items())
        fix = (
            "lower TRAIN_LEARNING_RATE, lengthen TRAIN_WARMUP_STEPS or clip harder "
            "(TRAIN_GRAD_CLIP), and run again"
        )
        if loss_scale is not None:
            named += f", in fp16 with a loss scale of {loss_scale:g}"
            fix = f"set TRAIN_PRECISION=float32, whose range is larger; or {fix}"
        raise NotFiniteError(f"step {step}: {named}", fix)
