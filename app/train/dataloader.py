"""Micro-batches on the device, read ahead by a thread."""

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import torch
from torch import Tensor

from app.data.sequences import BatchPlan, SequenceOrder
from app.data.token_stream import TokenStream

_BATCHES_AHEAD = 3


class BatchLoader:
    """Yields the micro-batches of one rank, step after step without end, on the device.

    Use it as a context manager: leaving it ends the thread that reads ahead.

    Args:
        stream: tokens of the split.
        order: order of its sequences.
        plan: how the sequences of a step are divided among ranks and micro-batches.
        sequences_consumed: sequences that the run has consumed so far.
        device: destination. Copies to a GPU are asynchronous, from pinned memory.
    """

    def __init__(
        self,
        stream: TokenStream,
        order: SequenceOrder,
        plan: BatchPlan,
        *,
        rank: int,
        sequences_consumed: int,
        context_length: int,
        device: torch.device,
    ) -> None:
        self._stream, self._order, self._device = stream, order, device
        self._context_length = context_length
        self._micro_batches = plan.micro_batches(sequences_consumed, rank)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: deque[Future[tuple[Tensor, Tensor]]] = deque()
        self._waited_seconds = 0.0

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of the next micro-batch, int64 [B, T] each, on the device."""
        while len(self._ahead) <= _BATCHES_AHEAD:
            first, count = next(self._micro_batches)
            self._ahead.append(self._reader.submit(self._read, first, count))
        started = time.perf_counter()
        inputs, targets = self._ahead.popleft().result()
        self._waited_seconds += time.perf_counter() - started
        return (
            inputs.to(self._device, non_blocking=True),
            targets.to(self._device, non_blocking=True),
        )

    def take_waited_seconds(self) -> float:
        """Return how long next_batch has waited for batches since the last call."""
        waited, self._waited_seconds = self._waited_seconds, 0.0
        return waited

    def _read(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        indices = self._order.sequences(first, count)
        inputs, targets = map(
            torch.from_numpy, self._stream.sequences(indices, self._context_length)
        )
        if self._device.type == "cuda":
            return inputs.pin_memory(), targets.pin_memory()
        return inputs, targets

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._reader.shutdown(cancel_futures=True)
