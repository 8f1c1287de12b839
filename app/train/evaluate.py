"""The loss on held-out text."""

import numpy as np
import torch

from app.data.loader import TokenStream
from app.data.windows import count_windows
from app.model.gpt import GPT
from app.train.device import Device


@torch.no_grad()
def held_out_loss(
    model: GPT, stream: TokenStream, *, max_tokens: int | None, batch_size: int, device: Device
) -> tuple[float, int]:
    """Mean loss over the first windows of a stream, in order.

    Args:
        model: uncompiled, so that a last smaller batch compiles nothing.
        stream: tokens of the split.
        max_tokens: targets to measure on, rounded down to whole windows; None for all.
        batch_size: windows in one forward pass.
        device: where and in which precision the model is computed, as in training.

    Returns:
        loss in nats per token, and the tokens it was measured on. Without a whole window: nan, 0.
    """
    length = model.config.context_length
    windows = count_windows(len(stream), length)
    if max_tokens is not None:
        windows = min(windows, max(1, max_tokens // length))
    if windows == 0:
        return float("nan"), 0
    total = torch.zeros((), dtype=torch.float64, device=device.torch_device)
    for first in range(0, windows, batch_size):
        indices = np.arange(first, min(first + batch_size, windows), dtype=np.int64)
        inputs, targets = stream.windows(indices, length)
        with device.forward_pass():
            loss = model(inputs.to(device.torch_device), targets.to(device.torch_device))
        total += loss.double() * len(indices)
    return total.item() / windows, windows * length
