"""Which of torch's attention kernels is fastest here: measured, since no rule holds for long.

cuDNN's beats FlashAttention-2 on some Hopper shapes, by up to 2.3 times, and loses on others; which
one torch prefers by itself changes with its version and cuDNN's.
"""

import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from app.model.gpt import GPTConfig
from app.train.device import Device

_REPEATS = 5
_AT_ONCE = 10


def choose_attention(device: Device, config: GPTConfig, windows: int) -> tuple[Device, str]:
    """The device with its kernels in the order of their speed, and what to say of it.

    A CPU has one kernel; deterministic runs take them in a fixed order.

    Args:
        windows: of a micro-batch.
    """
    if device.torch_device.type == "cpu":
        return device, "attention: torch's own kernel for CPUs"
    repeatable = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
    if device.deterministic:
        # Another start, or another rank, could measure another order.
        order = (*repeatable, SDPBackend.MATH)
        return replace(device, attention=order), "attention: flash, where it has a kernel"
    candidates = (SDPBackend.CUDNN_ATTENTION, *repeatable)
    ranked = rank_attention(config, windows, device.torch_device, device.dtype, candidates)
    told = ", ".join(f"{one.name.lower()} {1000 * time:.2f} ms" for one, time in ranked.items())
    return (
        replace(device, attention=(*ranked, SDPBackend.MATH)),
        f"attention of {windows} windows, forward and backward: {told or 'no fast kernel'}",
    )


def rank_attention(
    config: GPTConfig,
    windows: int,
    device: torch.device,
    dtype: torch.dtype,
    candidates: Sequence[SDPBackend],
) -> dict[SDPBackend, float]:
    """Seconds of a forward and backward pass for each candidate that works, fastest first."""
    shape = (windows, config.context_length, 3 * config.embd_size)
    # Of its own random numbers: the run's begin with its seed.
    numbers = torch.Generator(device).manual_seed(0)
    qkv = torch.randn(shape, device=device, dtype=dtype, generator=numbers, requires_grad=True)
    found: dict[SDPBackend, float] = {}
    for backend in candidates:
        # One that has no kernel for this device, type or shape warns of every reason, then raises.
        with warnings.catch_warnings(action="ignore"), suppress(RuntimeError), sdpa_kernel(backend):
            found[backend] = _seconds(qkv, config.num_heads)
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _seconds(qkv: Tensor, num_heads: int) -> float:
    """Of one pass, in the fastest of a few rounds; the first one also builds plans.

    Args:
        qkv: queries, keys and values as the model's projection gives them, [B, T, 3C]
    """
    # As the model has them: views into one tensor, not contiguous.
    q, k, v = (part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    gradient = torch.ones_like(q)
    seconds = []
    for _ in range(1 + _REPEATS):
        _wait(qkv.device)
        started = time.perf_counter()
        # Several, so that the device is behind: a kernel is what it takes, not how it is started.
        for _ in range(_AT_ONCE):
            y = scaled_dot_product_attention(q, k, v, is_causal=True)
            torch.autograd.grad(y, (q, k, v), gradient)
        _wait(qkv.device)
        seconds.append((time.perf_counter() - started) / _AT_ONCE)
    return min(seconds[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
