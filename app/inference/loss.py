"""The loss on held-out text."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from app.data.sequences import num_sequences
from app.data.token_stream import TokenStream
from app.hardware.device import Device
from app.model.gpt import GPT


def held_out_windows(stream: TokenStream, context_length: int, max_tokens: int | None) -> int:
    """Return how many windows to measure on: at least one if the stream has any.

    Args:
        max_tokens: targets to measure on, rounded down to whole windows; None for all.
    """
    windows = num_sequences(len(stream), context_length)
    return windows if max_tokens is None else min(windows, max(1, max_tokens // context_length))


@torch.no_grad()
def sequence_losses(
    model: GPT,
    stream: TokenStream,
    windows: int,
    *,
    batch_size: int,
    device: Device,
    rank: int = 0,
    ranks: int = 1,
    between: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Measure windows 0 … windows-1, or a rank's share of them, a batch at a time.

    Args:
        model: uncompiled, so that a last smaller batch compiles nothing.
        stream: tokens of the split.
        batch_size: windows that go through the blocks at once.
        device: where and in which precision the model is computed, as in training.
        between: called before each batch; what it raises ends the measurement.

    Yields:
        each window's mean loss, nats per token, float32 [B], on the device; and the targets it is
        of, int64 [B, T], on the CPU.
    """
    for first in range(rank * batch_size, windows, ranks * batch_size):
        between()
        indices = np.arange(first, min(first + batch_size, windows), dtype=np.int64)
        inputs, targets = map(
            torch.from_numpy, stream.sequences(indices, model.config.context_length)
        )
        with device.forward_pass():
            x = model.embed(inputs.to(device.torch_device))
            for block in model.transformer.h:
                x = block(x)
            # One after the other: logits are by far the largest tensor, and training keeps fewer.
            there = targets.to(device.torch_device)
            losses = [model.loss(x[i : i + 1], there[i : i + 1]) for i in range(len(indices))]
        yield torch.stack(losses), targets
