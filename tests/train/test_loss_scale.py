"""Loss scaling beside torch's own, in the training loop and on two ranks."""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from app.distributed.data_parallel import DataParallelLoss
from app.distributed.world import World
from app.errors import NotFiniteError
from app.hardware.device import Device
from app.model.gpt import GPT
from app.runs.metrics import StepRecord
from app.train.loop import train_steps
from app.train.loss_scale import LossScale
from app.train.lr_schedule import LRSchedule
from app.train.optimizer import Optimizers
from tests.distributed.ranks import Ranks
from tests.train.tiny_model import SEQUENCES_PER_STEP, TOKENS, adamw, new_loader, new_model

FP16 = Device(torch.device("cpu"), "CPU", "fp16", True, None)
Loss = Callable[[Tensor, Tensor], Tensor]
ALONE = World()


def steps(
    model: GPT,
    optimizers: Optimizers,
    scale: LossScale,
    *,
    loss: Loss | None = None,
    max_steps: int = 3,
    world: World = ALONE,
) -> Iterator[StepRecord]:
    schedule = LRSchedule(1e-2, "constant", 0, max_steps, 0.0)
    with new_loader(SEQUENCES_PER_STEP // 2) as loader:
        yield from train_steps(
            model,
            DataParallelLoss(model, loss or model, FP16.torch_device, world),
            optimizers,
            loader,
            lambda: schedule,
            FP16,
            world,
            first_step=0,
            accumulation_steps=2,
            grad_clip=0.5,
            loss_scale=scale,
            should_stop=lambda _: False,
        )


def state_of(model: GPT, optimizers: Optimizers) -> dict[str, Tensor]:
    tensors = dict(model.named_parameters()) | dict(optimizers.named_state(model))
    return {name: value.detach().clone() for name, value in tensors.items()}


def overflow_once(model: GPT, at_call: int) -> Loss:
    """The model's loss, whose gradient is infinite in one micro-batch."""
    calls = 0

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        value = model(inputs, targets)
        if calls == at_call:
            value.register_hook(lambda gradient: gradient * math.inf)
        return value

    return loss


def test_the_factor_is_that_of_torchs_scaler() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter])
    scaler, scale = torch.amp.GradScaler("cpu"), LossScale(2.0**16)
    scaler.scale(torch.ones(1))
    overflows = {3, 4, 5, 700, 2701, 4800}
    for step in range(5000):
        assert scale.factor == scaler.get_scale(), step
        gradient = math.inf if step in overflows else 1.0
        parameter.grad = torch.full((1,), gradient)
        scaler.step(optimizer)
        scaler.update()
        assert scale.skips(2.0, gradient) == (step in overflows)
    assert scale.updates == scaler.state_dict()["_growth_tracker"] == 199
    assert scale.factor == 2.0**12


def test_steps_equal_those_of_torchs_scaler() -> None:
    model, expected = new_model(), new_model()
    optimizers, optimizer = adamw(model), torch.optim.AdamW(expected.parameters(), lr=1e-2)
    results = list(steps(model, optimizers, LossScale(2.0**21), max_steps=12))

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22)
    losses, scales = list[float](), [2.0**22]
    for step in range(12):
        starts = [(step * SEQUENCES_PER_STEP + row) * 8 for row in range(SEQUENCES_PER_STEP)]
        rows = torch.from_numpy(np.stack([TOKENS[i : i + 9] for i in starts]).astype(np.int64))
        loss_sum = torch.zeros(())
        for half in rows.chunk(2):
            with torch.autocast("cpu", torch.float16):
                loss = expected(half[:, :-1], half[:, 1:]) / 2
            scaler.scale(loss).backward()
            loss_sum += loss.detach()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        optimizer.zero_grad()
        losses.append(loss_sum.item())

    assert [result.train_loss for result in results] == losses
    # GradScaler's factor is that of a micro-batch's part in the mean.
    assert [2 * (result.loss_scale or 0) for result in results] == scales[:-1]
    skipped = [bool(result.skipped) for result in results]
    assert 2 <= sum(skipped) <= 10
    assert skipped == [scale != after for scale, after in pairwise(scales)]
    torch.testing.assert_close(
        dict(model.named_parameters()), dict(expected.named_parameters()), rtol=0, atol=0
    )


@pytest.mark.parametrize("micro_batch", (1, 2))
def test_a_step_that_overflows_changes_nothing_but_the_factor(micro_batch: int) -> None:
    model, scale = new_model(), LossScale(1024.0, updates=7)
    optimizers = adamw(model)
    training = steps(model, optimizers, scale, loss=overflow_once(model, 2 + micro_batch))
    first = next(training)
    before = state_of(model, optimizers)
    overflowed = next(training)
    torch.testing.assert_close(state_of(model, optimizers), before, rtol=0, atol=0)
    assert (overflowed.skipped, overflowed.loss_scale) == (True, 1024.0)
    assert math.isfinite(overflowed.train_loss)
    assert overflowed.grad_norm is None
    assert (scale.factor, scale.updates) == (512.0, 0)
    last = next(training)
    assert (last.skipped, last.loss_scale) == (None, 512.0)
    assert first.grad_norm
    assert last.grad_norm
    assert 0.1 < last.grad_norm < 2 * first.grad_norm


def test_an_overflow_that_no_factor_can_mend_ends_the_run() -> None:
    model = new_model()
    loss = overflow_once(model, 1)
    with pytest.raises(NotFiniteError, match="in fp16 with a loss scale of 1\n") as error:
        next(steps(model, adamw(model), LossScale(1.0), loss=loss))
    assert error.value.fix.startswith("set TRAIN_PRECISION=float32")


def test_an_overflow_of_the_forward_pass_ends_the_run_at_once() -> None:
    model, scale = new_model(), LossScale()
    with torch.no_grad():
        # Finite in float32; the MLP's output is beyond fp16's 65,504.
        dict(model.named_parameters())["transformer.h.0.mlp.c_proj.bias"].fill_(1e5)
    with pytest.raises(NotFiniteError, match=r"step 0: loss (nan|inf)"):
        next(steps(model, adamw(model), scale))
    assert scale.factor == LossScale().factor


def test_the_gradients_that_are_reported_are_those_of_the_loss() -> None:
    norms = []
    for factor in (1.0, 1024.0):
        model = new_model()
        training = steps(
            model,
            adamw(model),
            LossScale(factor),
            loss=lambda *it, model=model: model(*it) + math.inf,
        )
        with pytest.raises(NotFiniteError, match="loss inf, gradient norm") as error:
            next(training)
        named = float(error.value.problem.split("gradient norm ")[1].split(",")[0])
        gradients = [it.grad for it in model.parameters() if it.grad is not None]
        assert torch.nn.utils.get_total_norm(gradients).item() == pytest.approx(named)
        norms.append(named)
    assert norms[1] == pytest.approx(norms[0], rel=0.01)


def skip_on_one_rank(rank: int, size: int) -> tuple[list[bool], float, float]:
    """Let one rank's gradients overflow in the second step; return what this rank saw."""
    model, scale = new_model(), LossScale()
    loss = overflow_once(model, 3) if rank == 1 else model
    results = list(steps(model, adamw(model), scale, loss=loss, world=World(rank, size, size)))
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return [bool(result.skipped) for result in results], scale.factor, weights.double().sum().item()


def test_all_ranks_skip_what_one_rank_cannot_represent(ranks: Ranks) -> None:
    one, other = ranks.run(skip_on_one_rank)
    assert one == other
    assert one[:2] == ([False, True, False], 2.0**13)
