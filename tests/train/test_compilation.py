"""Compiled code does what the model does, and only the training step is compiled."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from app.model import gpt
from app.model.generate import generate
from app.model.gpt import GPT, GPTConfig
from app.train.attention import choose_attention, rank_attention
from app.train.compilation import Extent, LossFunction, compiled_loss, extent_for
from app.train.device import Device, choose_device

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
    """Trains on a few batches again and again, so that the loss falls."""
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


@pytest.mark.parametrize("extent", ("model", "blocks"))
def test_compiled_training_is_that_of_the_plain_path(extent: Extent) -> None:
    """In float32 exactly within rounding, in bf16 within its own, for 50 steps."""
    plain = new_model()
    expected = losses_of(plain, plain, bf16=False, steps=50)
    assert expected[-1] < expected[0] - 1
    for bf16, tolerance in ((False, 1e-4), (True, 3e-2)):
        model = new_model()
        found = losses_of(model, compiled_loss(model, extent, DEVICE), bf16=bf16, steps=50)
        assert found == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("extent", ("model", "blocks"))
def test_evaluation_and_sampling_compile_nothing(extent: Extent) -> None:
    from torch._dynamo.utils import counters

    model = new_model()
    compiled = compiled_loss(model, extent, DEVICE)
    losses_of(model, compiled, bf16=True, steps=2)
    made = dict(counters["stats"])
    with torch.no_grad():
        for rows, length in itertools.product((1, 3), (5, 9)):
            tokens = batch(0)[:rows, : length + 1]
            model(tokens[:, :-1], tokens[:, 1:])
    generate(model, torch.tensor([[50256]]), 12)
    losses_of(model, compiled, bf16=True, steps=1)
    assert dict(counters["stats"]) == made


def test_code_for_one_attention_kernel_is_not_taken_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    found = []
    for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        torch.compiler.reset()
        counters.clear()
        device = replace(DEVICE, attention=(kernel,))
        with device.forward_pass():
            loss = compiled_loss(new_model(), "blocks", device)(batch(0)[:, :-1], batch(0)[:, 1:])
        loss.backward()
        found.append(counters["aot_autograd"]["autograd_cache_miss"])
    assert found[0] == found[1] > found[2] == 0


def test_padded_vocabulary_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = batch(1)
    results = []
    for padded_on in ((), ("cpu",)):
        monkeypatch.setattr(gpt, "PADDED_ON", padded_on)
        model = new_model()
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        results.append((loss, [parameter.grad for parameter in model.parameters()]))
    (plain, gradients), (padded, padded_gradients) = results
    torch.testing.assert_close(padded, plain, rtol=1e-6, atol=0)
    for one, other in zip(gradients, padded_gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("asked", "flops", "tokens", "extent"),
    (
        ("auto", None, 10**12, "blocks"),  # a CPU
        ("auto", 989e12, 20_000_000, "blocks"),
        ("auto", 989e12, 10_000_000_000, "model"),
        ("model", None, 1, "model"),
        ("false", 989e12, 10**10, None),
    ),
)
def test_short_runs_compile_less(
    asked: Any, flops: float | None, tokens: int, extent: Extent | None
) -> None:
    kind = torch.device("cuda" if flops else "cpu")
    device = Device(kind, "any", "bf16", deterministic=False, peak_flops=flops)
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert extent_for(asked, device, model, tokens) == extent


def test_attention_kernels_that_work_are_ranked() -> None:
    candidates = [SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]
    before = torch.get_rng_state()
    ranked = rank_attention(CONFIG, 4, CPU, torch.bfloat16, candidates)
    assert set(ranked) == {SDPBackend.MATH, SDPBackend.FLASH_ATTENTION}
    assert list(ranked.values()) == sorted(ranked.values())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_cpu_has_one_kernel() -> None:
    device = choose_device("cpu", "auto", "auto")
    assert choose_attention(device, CONFIG, 4) == (device, "attention: torch's own kernel for CPUs")
