"""The training loop on a tiny model: its arithmetic, and what it leaves undone."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from app.distributed.data_parallel import DataParallelLoss
from app.distributed.world import World
from app.errors import NotFiniteError
from app.model.gpt import GPT
from app.runs.metrics import StepRecord
from app.train.loop import train_steps
from app.train.lr_schedule import LRSchedule
from app.train.optimizer import Optimizers
from tests.train.tiny_model import (
    CONFIG,
    CPU,
    SEQUENCES_PER_STEP,
    TOKENS,
    adamw,
    new_loader,
    new_model,
)

Loss = Callable[[Tensor, Tensor], Tensor]


def steps(
    model: GPT,
    optimizers: Optimizers,
    *,
    loss: Loss | None = None,
    max_steps: int = 1,
    accumulation_steps: int = 1,
    grad_clip: float = 0.0,
    learning_rate: float = 1e-2,
    should_stop: Callable[[bool], bool] = lambda _: False,
) -> Iterator[StepRecord]:
    with new_loader(SEQUENCES_PER_STEP // accumulation_steps) as loader:
        yield from train_steps(
            model,
            DataParallelLoss(model, loss or model, CPU.torch_device, World()),
            optimizers,
            loader,
            lambda: LRSchedule(learning_rate, "constant", 0, max_steps, 0.0),
            CPU,
            World(),
            first_step=0,
            accumulation_steps=accumulation_steps,
            grad_clip=grad_clip,
            should_stop=should_stop,
        )


def weights(model: GPT) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def optimizer_state(model: GPT, optimizers: Optimizers) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in optimizers.named_state(model)}


def test_a_step_equals_one_that_is_written_out() -> None:
    model, expected = new_model(), new_model()
    (result,) = steps(model, adamw(model))

    starts = [row * CONFIG.context_length for row in range(SEQUENCES_PER_STEP)]
    rows = torch.from_numpy(np.stack([TOKENS[i : i + 9] for i in starts]).astype(np.int64))
    loss = expected(rows[:, :-1], rows[:, 1:])
    loss.backward()
    gradients = [one.grad for one in expected.parameters() if one.grad is not None]
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
    torch.optim.AdamW(expected.parameters(), lr=1e-2).step()

    assert (result.step, result.lr) == (0, 1e-2)
    assert result.train_loss == pytest.approx(loss.item())
    assert result.grad_norm == pytest.approx(norm)
    torch.testing.assert_close(weights(model), weights(expected))


def test_four_micro_batches_equal_one_batch() -> None:
    one, four = new_model(), new_model()
    (whole,) = steps(one, adamw(one))
    (divided,) = steps(four, adamw(four), accumulation_steps=4)
    assert divided.train_loss == pytest.approx(whole.train_loss)
    assert divided.grad_norm == pytest.approx(whole.grad_norm, rel=1e-4)
    torch.testing.assert_close(weights(four), weights(one))


@pytest.mark.parametrize("grad_clip", (0.0, 0.01, 1e6))
def test_gradients_are_clipped_and_their_norm_is_reported_unclipped(grad_clip: float) -> None:
    model = new_model()
    before = weights(model)
    descent = Optimizers(torch.optim.SGD(model.parameters(), lr=1.0))
    (result,) = steps(model, descent, grad_clip=grad_clip, learning_rate=1.0)
    changes = [new - old for new, old in zip(weights(model), before, strict=True)]
    norm = torch.cat([change.flatten() for change in changes]).norm().item()
    assert result.grad_norm
    assert result.grad_norm > 0.1
    assert norm == pytest.approx(min(result.grad_norm, grad_clip or math.inf), rel=1e-3)


def infinite_loss(loss: Tensor) -> Tensor:
    return loss * math.inf


def infinite_gradient(loss: Tensor) -> Tensor:
    loss.register_hook(lambda gradient: gradient * math.inf)
    return loss


@pytest.mark.parametrize("micro_batch", range(4))
@pytest.mark.parametrize("ruin", (infinite_loss, infinite_gradient))
def test_a_step_that_is_not_finite_changes_nothing(
    ruin: Callable[[Tensor], Tensor], micro_batch: int
) -> None:
    model, calls = new_model(), 0
    optimizers = adamw(model)

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        value = model(inputs, targets)
        return ruin(value) if calls == 4 + micro_batch + 1 else value

    training = steps(model, optimizers, loss=loss, max_steps=2, accumulation_steps=4)
    next(training)
    before = weights(model), optimizer_state(model, optimizers)
    with pytest.raises(NotFiniteError, match=r"step 1: loss .*, gradient norm (inf|nan)"):
        next(training)
    torch.testing.assert_close((weights(model), optimizer_state(model, optimizers)), before)


@pytest.mark.parametrize("micro_batch", range(4))
def test_a_stop_at_a_micro_batch_leaves_the_step_undone(micro_batch: int) -> None:
    model = new_model()
    optimizers, calls = adamw(model), []

    def should_stop(is_last: bool) -> bool:
        calls.append(is_last)
        return len(calls) == 4 + micro_batch + 1

    training = steps(model, optimizers, max_steps=3, accumulation_steps=4, should_stop=should_stop)
    next(training)
    before = weights(model), optimizer_state(model, optimizers)
    assert list(training) == []
    torch.testing.assert_close((weights(model), optimizer_state(model, optimizers)), before)
    assert calls == ([False, False, False, True] * 2)[: 4 + micro_batch + 1]
