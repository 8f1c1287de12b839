"""Compiled code computes the model's loss, and only the training step is compiled."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from app.distributed.data_parallel import LossFunction
from app.hardware.device import Device, select_device
from app.model.gpt import GPT, GPTConfig
from app.train.compile import compiled_loss
from tests.model.generation import generate

CONFIG = GPTConfig(context_length=32, vocab_size=50257, num_layers=3, embd_size=32, num_heads=2)
CPU = torch.device("cpu")
DEVICE = Device(CPU, "any", "float32", deterministic=False, peak_flops=None)


def new_model() -> GPT:
    torch.manual_seed(0)
    return GPT(CONFIG)


def batch(seed: int) -> Tensor:
    numbers = torch.Generator().manual_seed(seed)
    return torch.randint(0, CONFIG.vocab_size, (4, 33), generator=numbers)


def losses_of(model: GPT, loss_of: LossFunction, *, bf16: bool, steps: int) -> list[float]:
    """Train on a few batches again and again, so that the loss falls."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        tokens = batch(step % 5)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = loss_of(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_compiled_training_equals_uncompiled_training() -> None:
    """For 50 steps, in float32 and in bf16 but for their rounding."""
    plain = new_model()
    expected = losses_of(plain, plain, bf16=False, steps=50)
    assert expected[-1] < expected[0] - 1
    for bf16, tolerance in ((False, 1e-4), (True, 3e-2)):
        model = new_model()
        losses = losses_of(model, compiled_loss(model, DEVICE), bf16=bf16, steps=50)
        assert losses == pytest.approx(expected, abs=tolerance)


def test_evaluation_and_sampling_compile_nothing() -> None:
    from torch._dynamo.utils import counters

    model = new_model()
    compiled = compiled_loss(model, DEVICE)
    losses_of(model, compiled, bf16=True, steps=2)
    made = dict(counters["stats"])
    with torch.no_grad():
        for rows, length in itertools.product((1, 3), (5, 9)):
            tokens = batch(0)[:rows, : length + 1]
            model(tokens[:, :-1], tokens[:, 1:])
    generate(model, torch.tensor([[50256]]), 12)
    losses_of(model, compiled, bf16=True, steps=1)
    assert dict(counters["stats"]) == made


def test_the_cache_keeps_deterministic_code_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    cache_misses = []
    for deterministic in ("false", "true", "false"):
        torch.compiler.reset()
        counters.clear()
        device = select_device("cpu", "float32", deterministic)
        with device.forward_pass():
            loss = compiled_loss(new_model(), device)(batch(0)[:, :-1], batch(0)[:, 1:])
        loss.backward()
        cache_misses.append(counters["aot_autograd"]["autograd_cache_miss"])
    assert cache_misses[0] == cache_misses[1] > cache_misses[2] == 0
